"""Weight gradients (W) apart from the rest of the backward (B), in every kind of linear layer."""
