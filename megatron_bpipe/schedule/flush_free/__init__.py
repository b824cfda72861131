"""Schedules without a flush, cut into the iterations of a training loop."""
