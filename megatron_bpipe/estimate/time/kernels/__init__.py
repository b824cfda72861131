"""Seconds of what a GPU runs: matrix products, attention, the output layer, collectives."""
