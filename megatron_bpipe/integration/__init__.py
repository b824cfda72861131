"""The only place that names Megatron: install and uninstall, flags, checks, the replacement."""
