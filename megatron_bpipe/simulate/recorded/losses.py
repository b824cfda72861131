"""Losses of two runs, bit by bit: each float is compared as the hexadecimal text of its bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bpipe.report.run import DIGEST


@dataclass(frozen=True)
class Losses:
    """``identical``: as many iterations in both, at least one, and every float the same bits."""

    identical: bool
    said: str


def compare_losses(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> Losses:
    """Compare what two reports recorded."""
    for name, losses in (("A", a), ("B", b)):
        if not losses:
            return Losses(False, f"cannot be compared: {name} recorded none")
    for n, (mine, other) in enumerate(zip(a, b, strict=False)):
        if list(mine) != list(other):
            return Losses(False, f"NO, first at iteration {n + 1}: {_apart(mine, other)}")
    if len(a) != len(b):
        shorter = min(len(a), len(b))
        return Losses(
            False, f"the first {shorter} are, but A has {len(a)} iterations and B {len(b)}"
        )
    count = f"{len(a)} iteration" + "s" * (len(a) != 1)
    return Losses(True, f"yes, bitwise ({count})")


def _apart(mine: Sequence[str], other: Sequence[str]) -> str:
    if len(mine) != len(other):
        return f"{len(mine)} and {len(other)} numbers"
    one, two = next((x, y) for x, y in zip(mine, other, strict=True) if x != y)
    if one.startswith(DIGEST) or two.startswith(DIGEST):
        return f"{one} and {two}"
    return f"{float.fromhex(one)!r} ({one}) and {float.fromhex(two)!r} ({two})"
