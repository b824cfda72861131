"""From logical ops to lowered ones: messages, ends of transfers, the acceptor's part."""
