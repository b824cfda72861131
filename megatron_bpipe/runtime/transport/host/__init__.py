"""Host memory for activations: the transport without a partner, pools, and how much a node has."""
