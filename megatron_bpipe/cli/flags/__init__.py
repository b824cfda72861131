"""What each command takes: one file a command, quick to import, for ``--help``."""
