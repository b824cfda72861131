"""Evictions, loads and loans added to a schedule."""
