"""Every schedule in Megatron's loop, against stock or an independent reference."""
