"""Proofs about a schedule: dependencies, pairing, the memory bound, freedom from deadlock."""
