"""Balance in parts, and by what was measured, in Megatron's loop."""
