"""What ops cost.  Units: seconds and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StageCosts:
    """One stage; what depends on the chunk is a tuple by chunk (one entry: the same for all).

    ``backward`` is the whole backward, or the input's gradient alone where the schedule has W;
    ``weight`` is W; ``recompute`` is added to every backward.  ``evict`` and ``load`` are fixed
    seconds of a transfer beside what its ``moved`` bytes take on the link.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...] = (0.0,)
    recompute: float = 0.0
    evict: float = 0.0
    load: float = 0.0
    moved: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            unit = "bytes" if field.name == "moved" else "seconds"
            for number in value if isinstance(value, tuple) else (value,):
                if not 0 <= number < math.inf:
                    raise ValueError(f"{field.name} is {number}: give {unit}, 0 or more")
        if not (self.forward and self.backward and self.weight):
            raise ValueError("forward, backward and weight need one entry at least")


@dataclass(frozen=True)
class Costs:
    """All stages.

    ``send`` fixed seconds of a message between stages, ``message`` its bytes; ``once`` seconds
    after the pipeline has drained (optimizer, data-parallel reduce).
    """

    stages: tuple[StageCosts, ...]
    send: float = 0.0
    message: int = 0
    once: float = 0.0

    def __post_init__(self) -> None:
        for name in ("send", "message", "once"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it cannot be negative")


def even_costs(
    p: int,
    *,
    forward: float = 1.0,
    backward: float = 1.0,
    weight: float = 0.0,
    chunks: int = 1,
    send: float = 0.0,
    transfer: float = 0.0,
    once: float = 0.0,
) -> Costs:
    """Equal stages: seconds of a whole stage's forward and backward, shared by ``chunks`` chunks.

    ``transfer`` is one eviction or load.
    """
    stage = StageCosts(
        forward=(forward / chunks,),
        backward=(backward / chunks,),
        weight=(weight / chunks,),
        evict=transfer,
        load=transfer,
    )
    return Costs((stage,) * p, send=send, once=once)
