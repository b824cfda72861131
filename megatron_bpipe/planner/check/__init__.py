"""Published runs beside predictions: how far off the planner is where nothing was fitted."""
