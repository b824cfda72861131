"""Recorded runs (``--bpipe-report``): drawn over their prediction, and compared two by two."""
