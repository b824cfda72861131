"""Seconds and FLOPs: of a layer, of an op, of an iteration."""
