"""The lender's part: AC takes an evicted activation, RT returns it.

They are placed by a unit-time run of the schedule: as late as possible, but no later than the
evictor starts E or L in that run.  So neither delays the lender, every AC finds a slot and every RT
its data in that run; and since what deadlocks does not depend on speed, they do not deadlock in
any.  A lender with several evictors answers each in the order of its E and L.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.schedule.lowering.batches import batch_size
from megatron_bpipe.schedule.ops import Kind, Op, Schedule, other_end


def answer(schedule: Schedule, evictor: int, op: Op) -> Op:
    """AC or RT, by which the lender answers an evictor's E or L."""
    kind = Kind.ACCEPT if op.kind is Kind.EVICT else Kind.RETURN
    return op._replace(kind=kind, other=None if op.other is None else evictor)


def answers(
    schedule: Schedule, evictor: int, lender: int, line: Sequence[Op], over: Sequence[int]
) -> list[tuple[int, Op]]:
    """What the lender posts, in order, with the time at which the evictor starts its part."""
    answers: list[tuple[int, Op]] = []
    waiting: list[Op] = []
    for op, end in zip(line, over, strict=True):
        if op.kind is Kind.EVICT or op.kind is Kind.LOAD:
            if other_end(schedule, evictor, op) == lender:
                waiting.append(answer(schedule, evictor, op))
        elif waiting and op.kind.computation:
            start = end - (schedule.parts if op.part is None else 1)
            answers += ((start, one) for one in waiting)
            waiting.clear()
    return answers


def with_answers(
    line: Sequence[Op], over: Sequence[int], answers: Sequence[tuple[int, Op]]
) -> tuple[Op, ...]:
    """The acceptor's line with each answer before the first batch that is over after its time."""
    out: list[Op] = []
    placed = position = 0
    while position < len(line):
        size = batch_size(line, position)
        while placed < len(answers) and answers[placed][0] < over[position + size - 1]:
            out.append(answers[placed][1])
            placed += 1
        out += line[position : position + size]
        position += size
    return (*out, *(one for _, one in answers[placed:]))
