"""V-shaped schedules: chunk 0 goes down the stages, chunk 1 comes back up, B and W apart.

Stage 0 holds the first and the last layers, stage p-1 the two middle parts: what is long alive on
one chunk is short on the other, so all stages need the same memory.  Every micro-batch follows the
same building block, 6 units (F, B, W of two chunks) after the one before.  In the block, going
from a stage to the next takes a fixed number of units:

========  ===========  ===========  ==========  ==========  =================  ==============
name      F, chunk 0   F, chunk 1   B, chunk 1  B, chunk 0  memory (1F1B: p)   bubble (F=B=W)
========  ===========  ===========  ==========  ==========  =================  ==============
v-min     1            1            1           1           (p+4)//3           ~ 2p/3m
v-half    2            1            2           1           (p+2)//2           ~ p/2m
v-zb      4            2            4           2           p                  0
========  ===========  ===========  ==========  ==========  =================  ==============

An activation of chunk 0 lives 2(p-1-x) steps and those of chunk 1 in between, one of chunk 1 2x
steps: together the same on every stage, and proportional to the sum of the steps.  Where the
turns stand is searched: the earliest at which no stage wants two ops at once.

Source: Qi et al. 2024, "Pipeline Parallelism with Controllable Memory" (building blocks, figures of
the table); the steps are derived here from its condition.  Differs from the published schedules
in that nothing is reordered at the ends of an iteration.
"""

from __future__ import annotations

import functools
import itertools

from megatron_bpipe.schedule.bases.sizes import check_sizes
from megatron_bpipe.schedule.ops import DOWN, UP, Kind, Op, Schedule

_PERIOD = 6
STEPS = {"v-min": (1, 1, 1, 1), "v-half": (2, 1, 2, 1), "v-zb": (4, 2, 4, 2)}


def v_shape(p: int, m: int, name: str = "v-half") -> Schedule:
    """V-Min, V-Half or V-ZB (``name`` as in STEPS) of ``m`` micro-batches on ``p`` stages."""
    check_sizes(p, m)
    if name not in STEPS:
        raise ValueError(f"{name!r} is no V-shaped schedule: use {', '.join(STEPS)}")
    block = _block(p, STEPS[name])
    stages = []
    for places in block:
        timed = [
            (time + _PERIOD * i, op._replace(microbatch=i)) for i in range(m) for time, op in places
        ]
        timed.sort(key=lambda entry: entry[0])
        stages.append(tuple(op for _, op in timed))
    return Schedule(name, m, tuple(stages))


@functools.cache
def _block(p: int, steps: tuple[int, int, int, int]) -> tuple[tuple[tuple[int, Op], ...], ...]:
    """For each stage when it runs which op of the first micro-batch."""
    turns = itertools.product(range(1, _PERIOD + 1), repeat=3)
    for gaps in sorted(turns, key=lambda gaps: (sum(gaps), gaps)):
        starts = [_starts(stage, p, steps, gaps) for stage in range(p)]
        if all(len({time % _PERIOD for time in times}) == 4 for times in starts):
            return tuple(_with_weights(times) for times in starts)
    raise AssertionError(f"no turns for {steps}")  # a mistake in STEPS


def _starts(
    stage: int, p: int, steps: tuple[int, int, int, int], gaps: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Times of F0, F1, B1 and B0 on this stage; ``gaps`` are the units between at the turns."""
    down, up, back_down, back_up = steps
    below = p - 1 - stage
    first = (p - 1) * down + gaps[0]  # F1 on stage p-1
    second = first + (p - 1) * up + gaps[1]  # B1 on stage 0
    third = second + (p - 1) * back_down + gaps[2]  # B0 on stage p-1
    return (
        stage * down,
        first + below * up,
        second + stage * back_down,
        third + below * back_up,
    )


def _with_weights(times: tuple[int, int, int, int]) -> tuple[tuple[int, Op], ...]:
    """The block of one stage with each W in the first free unit after its B."""
    f0, f1, b1, b0 = times
    used = {time % _PERIOD for time in times}
    placed = [
        (f0, Op(Kind.FORWARD, 0)),
        (f1, Op(Kind.FORWARD, 0, 1, UP)),
        (b1, Op(Kind.BACKWARD, 0, 1, UP)),
        (b0, Op(Kind.BACKWARD, 0, 0, DOWN)),
    ]
    for _, op in sorted(placed[2:], key=lambda entry: entry[0]):
        after = b1 if op.chunk else b0
        time = next(t for t in itertools.count(after + 1) if t % _PERIOD not in used)
        used.add(time % _PERIOD)
        placed.append((time, op._replace(kind=Kind.WEIGHT)))
    return tuple(placed)
