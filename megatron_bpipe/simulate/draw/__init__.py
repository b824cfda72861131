"""Pictures of a simulated or recorded run: page, figure, trace, text."""
