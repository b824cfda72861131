"""Starts a Megatron script and supplies what a machine lacks."""
