"""The executor and what it needs: torch, but no Megatron."""
