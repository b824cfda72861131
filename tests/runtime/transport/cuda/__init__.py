"""Transports on CUDA, over stand-ins for the driver and its streams."""
