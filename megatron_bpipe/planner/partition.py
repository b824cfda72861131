"""How many layers each stage gets: equal time, as far as memory allows.

Stages may be unlike: other GPUs, the output layer's time on the last one, less memory for layers
where more micro-batches are held.  The slowest stage sets the pace, so its time is made as small as
whole layers allow, with no stage above what its memory takes.  All layers are the same, so this is
solved exactly (a test searches): the least pace at which the stages together take all layers.

This is the balanced partition of BaPipe (arXiv 2012.12544: equal computing time on unequal devices,
then corrected for memory) for layers that are the same, and with PipeDream-2BW's planner
(arXiv 2006.09503: repeated blocks; depth, replicas, micro-batch and recomputation by enumeration)
it is part of what ``search`` enumerates.

Units: seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageLimits:
    """One stage: seconds a layer, seconds of what it does besides, most layers that fit."""

    layer: float
    extra: float
    most: int


def balanced_partition(stages: Sequence[StageLimits], layers: int) -> tuple[int, ...] | None:
    """Layers of each stage, at least one, with the least time of the slowest stage.

    None where the stages cannot hold all layers, or there are fewer layers than stages.
    """
    p = len(stages)
    if layers < p or any(s.most < 1 for s in stages) or sum(s.most for s in stages) < layers:
        return None
    paces = sorted(
        {s.extra + k * s.layer for s in stages for k in range(1, min(s.most, layers) + 1)}
    )
    low, high = 0, len(paces) - 1
    while low < high:
        middle = (low + high) // 2
        if _room(stages, paces[middle], layers) >= layers:
            high = middle
        else:
            low = middle + 1
    taken = [_taken(s, paces[low], layers) for s in stages]
    if min(taken) < 1:
        return None
    for _ in range(sum(taken) - layers):
        # a layer too many: off the slowest stage; of equals, off the one that holds most
        slowest = max(
            (x for x in range(p) if taken[x] > 1),
            key=lambda x: (stages[x].extra + taken[x] * stages[x].layer, -x),
        )
        taken[slowest] -= 1
    return tuple(taken)


def uneven_chunks(layers: int, p: int, chunks: int) -> tuple[int, ...] | None:
    """Layers of p x chunks virtual stages that differ by one, None where some had none.

    The first, beside the embedding, and the last, beside the loss, may have none.  What is left
    over goes to whole rows of stages first, then to those in the middle.
    """
    parts = p * chunks
    fewer, more = divmod(layers, parts)
    if fewer == 0:
        lacking = parts - more
        if lacking > 2:
            return None
        sizes = [1] * parts
        sizes[-1] = 0
        sizes[0] = 0 if lacking == 2 else 1
        return tuple(sizes)
    rows, rest = divmod(more, p)
    sizes = [fewer] * parts
    for row in range(rows):
        for stage in range(p):
            sizes[row * p + stage] += 1
    for stage in range(p - 1 - rest, p - 1):
        sizes[rows * p + stage] += 1
    return tuple(sizes)


def _room(stages: Sequence[StageLimits], pace: float, layers: int) -> int:
    """Layers that all stages take within this pace; -1 where one cannot take any."""
    taken = [_taken(stage, pace, layers) for stage in stages]
    return -1 if min(taken) < 1 else sum(taken)


def _taken(stage: StageLimits, pace: float, layers: int) -> int:
    """Most layers of a stage within this pace and its memory."""
    fits = math.floor((pace - stage.extra) / stage.layer * (1 + 1e-12) + 1e-9)
    return max(0, min(fits, stage.most, layers))
