"""The balance pass: which micro-batches leave a stage, when they leave and when they come back."""
