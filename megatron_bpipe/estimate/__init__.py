"""What a run needs in memory, how fast it will be, and what the re-evaluation measured."""
