"""Gives each process the logical rank that the placement says."""
