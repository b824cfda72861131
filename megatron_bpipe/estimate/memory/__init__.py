"""Bytes: parameters, activations, and each stage's peak."""
