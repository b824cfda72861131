"""Checks of p and m that the generators share."""

from __future__ import annotations


def check_sizes(p: int, m: int, *, multiple: bool = False, name: str = "") -> None:
    """Raise ValueError unless p and m are at least 1 and, if asked, m is a multiple of p."""
    if p < 1:
        raise ValueError(f"p is {p}: a pipeline has at least 1 stage")
    if m < 1:
        raise ValueError(f"m is {m}: an iteration has at least 1 micro-batch")
    if multiple and m % p:
        raise ValueError(
            f"m is {m}: {name} needs a multiple of p = {p}; use {max(p, m - m % p)} or "
            f"{m - m % p + p}"
        )
