"""What the planner answers: advice, tables, JSON, the command line."""
