"""Schedules that run on over the optimizer steps."""
