"""From measured bytes to a schedule: the ways to run each stage, and the evictions of those chosen.

    arrange(schedule, bytes, limit)   ->  Arrangement: who lends what to whom
    lend(schedule, arrangement)       ->  the schedule with those evictions and loads

A *plan* of a stage keeps at most so many activations there, with the fewest evictions for so many
slots elsewhere.  Lenders' slots are all alike to it: so long as no more activations are away than
there are slots altogether, giving each the first slot that is free when it leaves never runs out of
slots (they are intervals of time), whoever lends them.

Units: bytes; activations of one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.schedule.balancing.balance import insert, plan_stage
from megatron_bpipe.schedule.balancing.lending import (
    Lending,
    StageNeed,
    Way,
    emptiest,
    on_host,
    within,
)
from megatron_bpipe.schedule.balancing.min_evictions import Stay
from megatron_bpipe.schedule.ops import HOST, Kind, Loan, Op, Schedule
from megatron_bpipe.schedule.validation.occupancy import (
    live,
    loans_of,
    remote_bytes,
    spans,
    transfers_with,
    with_own_loans,
)


@dataclass(frozen=True)
class MeasuredStage:
    """What one stage was measured to need.

    Attributes:
        fixed: bytes that are there in every schedule: static ones, and what computing needs.
        held: bytes of one activation of each chunk.
        leaving: those of it that an eviction takes away.
    """

    fixed: int
    held: tuple[int, ...]
    leaving: tuple[int, ...]


@dataclass(frozen=True)
class Arrangement:
    """Which of its `plans` each stage follows (0: nothing leaves), and who lends to whom."""

    plans: tuple[int, ...]
    loans: tuple[Loan, ...]


@lru_cache(maxsize=256)
def plans(line: tuple[Op, ...]) -> tuple[tuple[Stay, ...], ...]:
    """What may leave a line of F and B: nothing first, then fewer and fewer that stay.

    For each number that stays the plan with the fewest slots, then those that move less with more.
    """
    lives = spans(line)
    counts = live(lives)
    most = max(counts, default=0)
    found: list[tuple[Stay, ...]] = [()]
    for keep in range(most - 1, 0, -1):
        need = [count - keep for count in counts]
        before = None
        for slots in range(most - keep, most + 1):
            stays = plan_stage(lives, need, slots)
            if stays is not None and (before is None or len(stays) < before):
                found.append(tuple(stays))
                before = len(stays)
        if before is None:
            break
    return tuple(found)


def ways(line: tuple[Op, ...], stage: MeasuredStage) -> tuple[Way, ...]:
    """Bytes of each of a stage's plans."""
    forwards = [op for op in line if op.kind is Kind.FORWARD]
    lives = spans(line)
    whole = [_of(stage.held, op) for op in forwards]
    part = [_of(stage.leaving, op) for op in forwards]
    steps = sum(op.kind.computation for op in line)
    change = [0] * (steps + 1)
    for span, size in zip(lives, whole, strict=True):
        change[span.start] += size
        change[1 + (span.end if span.last is None else span.last)] -= size
    out = []
    for number, stays in enumerate(plans(line)):
        here = list(change)
        slots = [0] * (steps + 1)
        for stay in stays:
            if stay.evict + 1 < stay.load:
                here[stay.evict + 1] -= part[stay.span]
                here[stay.load] += part[stay.span]
            slots[stay.evict] += 1
            slots[stay.load + 1] -= 1
        moved = sum(part[stay.span] for stay in stays)
        out.append(Way(_highest(here), _highest(slots), moved, number))
    return tuple(out)


def worst_of(ranks: Sequence[MeasuredStage]) -> MeasuredStage:
    """Of several ranks of one stage the most of everything."""
    return MeasuredStage(
        max(rank.fixed for rank in ranks),
        tuple(map(max, zip(*(rank.held for rank in ranks), strict=True))),
        tuple(map(max, zip(*(rank.leaving for rank in ranks), strict=True))),
    )


def foretold(schedule: Schedule, stages: Sequence[MeasuredStage]) -> tuple[int, ...]:
    """The peak of each stage under a schedule, whoever lends: bytes of its own and of its pools."""
    own = []
    for line, stage in zip(schedule.stages, stages, strict=True):
        here = most = 0
        leaving = loading = 0
        last = Kind.WEIGHT if any(op.kind is Kind.WEIGHT for op in line) else Kind.BACKWARD
        for op in line:
            if op.kind is Kind.EVICT:
                leaving += _of(stage.leaving, op)
            elif op.kind is Kind.LOAD:
                loading += _of(stage.leaving, op)
            elif op.kind.computation:
                here += loading + (_of(stage.held, op) if op.kind is Kind.FORWARD else 0)
                most = max(most, here)
                here -= leaving + (_of(stage.held, op) if op.kind is last else 0)
                leaving = loading = 0
        own.append(stage.fixed + most)
    for loan in loans_of(schedule):
        if loan.lender != HOST:
            sizes = {c: (size,) for c, size in enumerate(stages[loan.evictor].leaving)}
            moves = transfers_with(schedule, loan.evictor, loan.lender)
            own[loan.lender] += remote_bytes(moves, sizes)
    return tuple(own)


def needs(schedule: Schedule, stages: Sequence[MeasuredStage]) -> tuple[StageNeed, ...]:
    """What the solver is asked, for a schedule of F and B."""
    return tuple(
        StageNeed(stage.fixed, max(1, *stage.leaving), ways(line, stage))
        for line, stage in zip(schedule.stages, stages, strict=True)
    )


def solve(
    schedule: Schedule, stages: Sequence[MeasuredStage], limit: int | None, to_host: bool = False
) -> Lending:
    """The best lending; the fullest stage as empty as can be, or with ``limit`` the fewest bytes.

    Slots are counted as the largest activation of their evictor when it is looked for; its peaks
    are those of the schedule that follows.

    Args:
        schedule: of F and B alone.
        stages: what each was measured to need.
        limit: bytes that no stage may exceed.
        to_host: nobody lends; everything goes to the stages' own host memory.

    Raises:
        LimitError: the limit cannot be kept.
    """
    asked = needs(schedule, stages)
    if to_host:
        found = on_host(asked, limit)
    else:
        found = emptiest(asked) if limit is None else within(asked, limit)
    return replace(found, peaks=foretold(lend(schedule, arrangement(found)), stages))


def arrangement(lending: Lending) -> Arrangement:
    """What `lend` needs of it."""
    return Arrangement(tuple(way.keep for way in lending.ways), lending.loans)


def lend(schedule: Schedule, chosen: Arrangement) -> Schedule:
    """The same computations with evictions and loads to whom the arrangement says."""
    stages = []
    for stage, (line, number) in enumerate(zip(schedule.stages, chosen.plans, strict=True)):
        stays = plans(line)[number]
        loans = [loan for loan in chosen.loans if loan.evictor == stage]
        where = _lenders_of(line, stays, loans)
        stages.append(
            tuple(
                op._replace(other=where[op.activation])
                if op.kind is Kind.EVICT or op.kind is Kind.LOAD
                else op
                for op in insert(line, stays)
            )
        )
    name = schedule.name + ("+bpipe" if chosen.loans else "")
    return with_own_loans(replace(schedule, name=name, stages=tuple(stages)))


def _lenders_of(
    line: Sequence[Op], stays: Sequence[Stay], loans: Sequence[Loan]
) -> Mapping[tuple[int, int, bool], int]:
    """To whom each activation goes: the first lender that has a slot when it leaves."""
    forwards = [op.activation for op in line if op.kind is Kind.FORWARD]
    until: dict[int, list[int]] = {loan.lender: [-1] * loan.slots for loan in loans}
    where = {}
    for stay in sorted(stays, key=lambda stay: (stay.evict, stay.load)):
        lender = next(
            lender for lender, ends in until.items() if any(end < stay.evict for end in ends)
        )
        ends = until[lender]
        ends[next(n for n, end in enumerate(ends) if end < stay.evict)] = stay.load
        where[forwards[stay.span]] = lender
    return where


def _of(sizes: Sequence[int], op: Op) -> int:
    return sizes[op.chunk if op.chunk < len(sizes) else -1]


def _highest(change: Sequence[int]) -> int:
    most = now = 0
    for step in change:
        now += step
        most = max(most, now)
    return most
