"""Base schedules beside 1F1B, one family a file, and the catalogue of all by name."""
