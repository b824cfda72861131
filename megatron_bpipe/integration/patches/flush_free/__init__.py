"""Schedules without a flush in Megatron's loop: what lives from one call to the next."""
