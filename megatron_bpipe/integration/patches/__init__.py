"""What Megatron sees replaced or wrapped while the patch set is installed."""
