"""How a micro-batch's pieces lie in messages of fixed size. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_bpipe.runtime.block import padded

Placed = tuple[torch.Tensor, int]  # a flat uint8 tensor and where it begins


def divide(pieces: Sequence[torch.Tensor], slot: int) -> tuple[list[Placed], list[torch.Tensor]]:
    """What goes into ``slot`` bytes, each with its place; and what is left over.

    A piece that does not fit whole is cut: what spills is what is too much, no more.
    """
    fitting: list[Placed] = []
    rest: list[torch.Tensor] = []
    at = 0
    for piece in pieces:
        size = min(piece.numel(), max(0, slot - at))
        if size:
            fitting.append((piece[:size], at))
        if size < piece.numel():
            rest.append(piece[size:])
        at += padded(piece.numel())
    return fitting, rest


def chunks(slot: int, size: int) -> list[tuple[int, int]]:
    """First and one-past-last byte of each part of at most ``size`` bytes of a slot."""
    return [(low, min(low + size, slot)) for low in range(0, slot, size)]


def overlaps(placed: Sequence[Placed], low: int, high: int) -> list[Placed]:
    """The parts of ``placed`` that lie in ``[low, high)``, each with its place therein."""
    found: list[Placed] = []
    for piece, at in placed:
        first, last = max(at, low), min(at + piece.numel(), high)
        if first < last:
            found.append((piece[first - at : last - at], first - low))
    return found
