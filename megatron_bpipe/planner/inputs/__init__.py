"""What the planner is asked: flags, model files, cluster files, profiles."""
