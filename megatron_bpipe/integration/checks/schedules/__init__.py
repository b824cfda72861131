"""What each schedule that is not Megatron's own refuses at start-up, by name."""
