"""Measures a run without changing it: recorder, memory books, audit, report, link watch."""
