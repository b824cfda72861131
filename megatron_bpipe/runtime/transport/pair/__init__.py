"""The two ranks of a pair: how they meet, what links them, which transport they agree on."""
