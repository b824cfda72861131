"""The planner: which parallel sizes, partition, schedule and memory saving to train with."""
