"""What occupies a stage: the counts that the bound is about.

Step t of a stage is its t-th computation (F, B or W).  While a computation runs, a stage holds
every micro-batch whose forward has started and whose backward has not ended; on an evictor those
are not counted whose copy has left and whose return has not begun.  A slot of the acceptor is
occupied from the start of the computation beside which E runs to the end of the one beside which
L runs.  Where a schedule splits the
backward, an activation is held until its weight gradients (W) are computed.

Units: activations of one chunk, or parts of them where an activation travels in parts (a forward
then adds u, a transfer moves one, each part of a backward frees one); `ops.microbatches` makes
micro-batches of a whole stage of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from megatron_bpipe.schedule.balancing.min_evictions import Span
from megatron_bpipe.schedule.ops import Kind, Loan, Op, Schedule, borrowers, other_end


def spans(line: Sequence[Op], parts: int = 1) -> list[Span]:
    """The life of each activation of a line of whole computations, in order of the forwards.

    A backward has ``parts`` steps, any other computation one.

    Raises ValueError for a line that computes something twice, or backwards before forwards.
    """
    start: dict[tuple[int, int, bool], int] = {}
    end: dict[tuple[int, int, bool], int] = {}
    last: dict[tuple[int, int, bool], int] = {}
    step = 0
    for op in line:
        kind = op.kind
        if not kind.computation:
            continue
        activation = op.activation
        if kind is Kind.FORWARD:
            if activation in start:
                raise ValueError(f"{op} stands twice in a line: keep one")
            start[activation] = step
        else:
            ends, before = (end, start) if kind is Kind.BACKWARD else (last, end)
            if activation in ends or activation not in before:
                what = "forward" if kind is Kind.BACKWARD else "backward"
                raise ValueError(f"{op} must stand once in a line, after its {what}")
            ends[activation] = step
        step += parts if kind is Kind.BACKWARD else 1
    if len(start) != len(end):
        raise ValueError(f"{len(start)} forwards but {len(end)} backwards in a line: pair them")
    return [Span(begin, end[what], last.get(what)) for what, begin in start.items()]


def live(lives: Sequence[Span], parts: int = 1) -> list[int]:
    """For each step how many units live, wherever they are.

    A backward frees its parts step by step, the latest layers' first, where nothing else (`last`)
    still needs them.
    """
    steps = max((max(span.end + parts - 1, span.last or 0) for span in lives), default=-1) + 1
    change = [0] * (steps + 1)
    for span in lives:
        change[span.start] += parts
        for n in range(parts):
            change[1 + (span.end + n if span.last is None else span.last)] -= 1
    return list(accumulate(change[:-1]))


def occupancy(line: Sequence[Op], parts: int = 1) -> tuple[list[int], list[int]]:
    """For each step how many units are on this stage, and how many slots its partner lends.

    A step is a computation, or one part of a backward that is written part by part.  Transfers in
    flight count on both sides.  Works on logical and lowered lines.
    """
    here, lent, loading, leaving = 0, 0, 0, 0
    resident: list[int] = []
    remote: list[int] = []
    last = Kind.WEIGHT if any(op.kind is Kind.WEIGHT for op in line) else Kind.BACKWARD
    for op in line:
        if op.kind is Kind.EVICT:
            leaving += 1
        elif op.kind is Kind.LOAD:
            loading += 1
        elif op.kind.computation:
            here += loading + parts * (op.kind is Kind.FORWARD)
            lent += leaving
            resident.append(here)
            remote.append(lent)
            here -= leaving + (op.kind is last) * (parts if op.part is None else 1)
            lent -= loading
            loading = leaving = 0
    return resident, remote


def transfers_with(schedule: Schedule, evictor: int, lender: int) -> list[Op]:
    """The evictor's computations, and of its transfers those with this lender."""
    return [
        op
        for op in schedule.stages[evictor]
        if op.kind.computation
        or (
            (op.kind is Kind.EVICT or op.kind is Kind.LOAD)
            and other_end(schedule, evictor, op) == lender
        )
    ]


def borrowed(schedule: Schedule, evictor: int, lender: int) -> int:
    """Most slots of a lender that this evictor ever has in use, in flight included."""
    return max(occupancy(transfers_with(schedule, evictor, lender), schedule.parts)[1], default=0)


def lent(schedule: Schedule, lender: int) -> int:
    """Most slots that a stage lends, to all its evictors: for each the most it ever uses."""
    return sum(borrowed(schedule, x, lender) for x in borrowers(schedule, lender))


def loans_of(schedule: Schedule) -> tuple[Loan, ...]:
    """Who really keeps how much of whom, whatever the schedule's rule for that is."""
    pairs = {
        (stage, other_end(schedule, stage, op)): None
        for stage, line in enumerate(schedule.stages)
        for op in line
        if op.kind is Kind.EVICT
    }
    return tuple(Loan(x, y, borrowed(schedule, x, y)) for x, y in pairs)


def with_own_loans(schedule: Schedule) -> Schedule:
    """The schedule with the loans that its transfers name, and what each stage then keeps."""
    keeps = tuple(peak(line, schedule.parts) for line in schedule.stages)
    return replace(schedule, loans=loans_of(schedule), keeps=keeps, budget=None)


def peak(line: Sequence[Op], parts: int = 1) -> int:
    """Most units on this stage at any step, slots it lends not counted."""
    return max(occupancy(line, parts)[0], default=0)


def remote_bytes(line: Sequence[Op], sizes: Mapping[int, Sequence[int]]) -> int:
    """Most bytes of one evictor that are remote or in flight at any step: its acceptor's pool.

    ``sizes`` has for each chunk the bytes of each part of one of its activations.
    """
    here = most = 0
    returning = 0  # a load's slot is free when the computation beside it is over
    for op in line:
        if op.kind is Kind.EVICT:
            here += sizes[op.chunk][op.part or 0]
        elif op.kind is Kind.LOAD:
            returning += sizes[op.chunk][op.part or 0]
        elif op.kind.computation:
            most = max(most, here)
            here -= returning
            returning = 0
    return most
