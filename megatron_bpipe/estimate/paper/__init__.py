"""What belongs to the re-evaluation paper (arXiv 2401.02088) alone: its equations and tables."""
