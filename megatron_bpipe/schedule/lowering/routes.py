"""Where an activation comes from and goes to.

::

    chunk 0   stage 0 -> 1 -> ... -> p-1        downwards; upwards (~) the other way
    chunk 1   stage 0 -> 1 -> ... -> p-1        entered from the end of chunk 0

Chunk c+1 continues where chunk c of the same micro-batch ended: across the ring for interleaved
schedules (both chunks downwards), on the same stage for V-shaped ones (chunk 1 upwards).
"""

from __future__ import annotations

from collections.abc import Set

from megatron_bpipe.schedule.ops import UP, Kind, Op, Schedule

Activation = tuple[int, int, bool]  # as Op.activation: micro-batch, chunk, upwards
Place = tuple[int, Activation]  # on which stage it is called what


def known_activations(schedule: Schedule) -> set[Activation]:
    """All activations of the schedule; every stage computes each once, so one line has all."""
    return {op.activation for op in schedule.stages[0] if op.kind is Kind.FORWARD}


def upstream(place: Place, p: int, known: Set[Activation]) -> Place | None:
    """Whose output is this place's input; None where the micro-batch enters the model.

    ``known`` are all activations of the schedule.
    """
    stage, activation = place
    microbatch, chunk, up = activation
    before = stage + 1 if up else stage - 1
    if 0 <= before < p:
        return before, activation
    for way in (up, not up):
        if (microbatch, chunk - 1, way) in known:
            return (0 if way else p - 1), (microbatch, chunk - 1, way)
    return None


def downstream(place: Place, p: int, known: Set[Activation]) -> Place | None:
    """Whose input is this place's output; None where the micro-batch leaves the model."""
    stage, activation = place
    microbatch, chunk, up = activation
    after = stage - 1 if up else stage + 1
    if 0 <= after < p:
        return after, activation
    for way in (up, not up):
        following = (p - 1 if way else 0), (microbatch, chunk + 1, way)
        if following[1] in known and upstream(following, p, known) == place:
            return following
    return None


def peer(op: Op, stage: int, p: int, known: Set[Activation]) -> int | None:
    """With which stage a message op (SF, RF, SB, RB) of this stage is exchanged.

    None where there is none: at the ends of the pipeline, and between two chunks on one stage.
    """
    ahead = op.kind is Kind.SEND_FORWARD or op.kind is Kind.RECV_BACKWARD
    other = stage + 1 if ahead is not (op.direction is UP) else stage - 1
    if 0 <= other < p:
        return other
    place = (downstream if ahead else upstream)((stage, op.activation), p, known)
    return None if place is None or place[0] == stage else place[0]
