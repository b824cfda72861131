"""All stages as processes on one GPU (--bpipe-rehearsal)."""
