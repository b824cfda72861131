"""The balance pass: insert evictions and loads so that no stage exceeds the budget.

Stage 0 of p = 4, m = 8 in 1F1B would hold 4 micro-batches, stage 3 only 1.  With the budget of
ceil((4+2)/2) = 3 each line keeps its computations, and stage 0 gains transfers beside them::

    F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7
          E1    E3          E5       E6
                   L1          L3       L5 L6

The acceptor lends its slots for the whole run, whatever the relative timing of the two stages,
so a pair must satisfy at every step: the acceptor's own peak + slots ever in use <= budget.
The evictions are the fewest possible wherever a stage's backwards come in the order of its
forwards (1F1B and most others); otherwise nested activations are planned after the enclosing
ones, which keeps the bound but may take more transfers, or a larger budget, than necessary.

Paper: section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from megatron_bpipe.schedule.balancing.min_evictions import Span, Stay, fewest_evictions
from megatron_bpipe.schedule.ops import (
    Kind,
    Op,
    Schedule,
    default_budget,
    is_evictor,
    microbatches,
    quantity,
    units,
)
from megatron_bpipe.schedule.validation.occupancy import live, occupancy, spans


class BudgetError(ValueError):
    """No plan keeps every stage within ``budget``; ``least`` is the smallest that works.

    Both count micro-batches of a whole stage.
    """

    def __init__(self, schedule: Schedule, budget: float, least: float) -> None:
        self.budget, self.least = budget, least
        super().__init__(
            f"budget {quantity(budget)} is too small for {schedule.name} with p={schedule.p}, "
            f"m={schedule.microbatches}: use {quantity(least)} or more"
        )


def balance(schedule: Schedule, budget: float | None = None, parts: int = 1) -> Schedule:
    """The same computations with evictions and loads that keep every stage within ``budget``.

    ``budget`` counts micro-batches of a whole stage, decimals allowed: one chunk of v is 1/v, one
    of its ``parts`` again a share of that.  It defaults to BPipe's ceil((p+2)/2), for schedules
    with chunks to the least that is possible with whole activations.  With enough budget nothing
    is inserted.

    With ``parts`` more than 1 an activation leaves and returns in so many pieces, those of the
    earliest layers first out and last back, and a backward beside whose inner steps something
    leaves or returns is written part by part: less travels at the same budget, and smaller budgets
    can be kept.

    Raises BudgetError if the budget is too small, ValueError for fewer parts than 1 or if
    ``schedule`` is lowered or already has evictions.
    """
    if parts < 1:
        raise ValueError(f"parts is {parts}: an activation has at least 1; use 1 to move it whole")
    base, schedule = schedule, replace(schedule, parts=parts)
    lives, chunks = _lives(schedule), schedule.chunks
    if budget is None:
        budget = default_budget(schedule.p) if chunks == 1 else least_budget(base)
    plans = _plan_all(schedule, lives, units(budget, schedule.grain))
    if plans is None:
        raise BudgetError(schedule, budget, _least_budget(schedule, lives))
    stages = tuple(
        insert(line, stays, parts) if stays else line
        for line, stays in zip(schedule.stages, plans, strict=True)
    )
    name = schedule.name + ("+bpipe" if any(plans) else "")
    return replace(schedule, name=name, stages=stages, budget=budget)


def least_budget(schedule: Schedule, parts: int = 1) -> float:
    """The smallest budget that ``balance`` accepts, in micro-batches of a whole stage."""
    schedule = replace(schedule, parts=parts)
    return _least_budget(schedule, _lives(schedule))


def slots(schedule: Schedule, evictor_stage: int) -> int:
    """Most units of this evictor that are ever remote or in flight: its acceptor's pool.

    Counts activations of one chunk, or parts of them (`Schedule.parts`).

    Raises ValueError for a stage that is no evictor.
    """
    if not is_evictor(evictor_stage, schedule.p):
        raise ValueError(
            f"stage {evictor_stage} of p = {schedule.p} does not evict: "
            f"evictors are the stages below {schedule.p // 2}"
        )
    return max(occupancy(schedule.stages[evictor_stage], schedule.parts)[1], default=0)


def _lives(schedule: Schedule) -> list[tuple[Span, ...]]:
    """The spans of every stage of a schedule still to be balanced."""
    for line in schedule.stages:
        for op in line:
            if not op.kind.computation:
                raise ValueError(f"{schedule.name} already has {op}: balance a schedule of F and B")
    return [_spans(line, schedule.parts) for line in schedule.stages]


@lru_cache(maxsize=256)
def _spans(line: tuple[Op, ...], parts: int) -> tuple[Span, ...]:
    """As `spans`, once where a schedule is balanced with many budgets."""
    return tuple(spans(line, parts))


def _least_budget(schedule: Schedule, lives: Sequence[Sequence[Span]]) -> float:
    """The least feasible budget, searched upwards from half of what each pair holds."""
    p, parts = schedule.p, schedule.parts
    peaks = [max(live(spans_here, parts), default=0) for spans_here in lives]
    least = max((peaks[x] + peaks[p - 1 - x] + 1) // 2 for x in range(p))
    while _plan_all(schedule, lives, least) is None:
        least += 1
    return microbatches(least, schedule.grain)


def _plan_all(
    schedule: Schedule, lives: Sequence[Sequence[Span]], budget: int
) -> list[list[Stay]] | None:
    """What each stage evicts; None if some stage cannot keep the budget (in units)."""
    p, parts = schedule.p, schedule.parts
    counts = [live(spans_here, parts) for spans_here in lives]
    peaks = [max(count, default=0) for count in counts]
    if max(peaks[p // 2 :]) > budget:  # acceptors and the middle stage cannot evict
        return None
    plans: list[list[Stay]] = [[] for _ in range(p)]
    for stage in range(p // 2):
        if peaks[stage] > budget:
            room = budget - peaks[p - 1 - stage]
            stays = plan_stage(lives[stage], [n - budget for n in counts[stage]], room, parts)
            if stays is None:
                return None
            plans[stage] = stays
    return plans


def plan_stage(
    lives: Sequence[Span], need: Sequence[int], room: int, parts: int = 1
) -> list[Stay] | None:
    """What one evictor evicts so that ``need`` units are away at each step, in ``room`` slots.

    One layer of spans after the other takes as much of the need as it can; 1F1B has one layer.
    None if that is not enough.
    """
    lent = [0] * len(need)
    plan: list[Stay] = []
    for layer in _layers(lives):
        spans_here = [lives[i] for i in layer]
        rooms = [room - n for n in lent]
        if len(layer) == len(lives):
            return fewest_evictions(spans_here, need, rooms, parts)
        windows = [(span.start + 2, span.end + k - 2) for span in spans_here for k in range(parts)]
        reach = _profile(len(need), windows)
        part = [min(n, most) for n, most in zip(need, reach, strict=True)]
        stays = fewest_evictions(spans_here, part, rooms, parts)
        if stays is None:
            return None
        plan += [replace(stay, span=layer[stay.span]) for stay in stays]
        away = _profile(len(need), [(stay.evict + 1, stay.load - 1) for stay in stays])
        more = _profile(len(need), [(stay.evict, stay.load) for stay in stays])
        need = [n - gone for n, gone in zip(need, away, strict=True)]
        lent = [n + slots_here for n, slots_here in zip(lent, more, strict=True)]
        if max(need, default=0) <= 0:
            return plan
    return None


def _profile(steps: int, intervals: Sequence[tuple[int, int]]) -> list[int]:
    """For each step how many of the intervals (first, last step) contain it."""
    change = [0] * (steps + 1)
    for first, last in intervals:
        if first <= last:
            change[first] += 1
            change[last + 1] -= 1
    return list(accumulate(change[:steps]))


def _layers(lives: Sequence[Span]) -> Iterator[list[int]]:
    """Indices of spans not inside another span, then of those left not inside another, ..."""
    left = list(range(len(lives)))
    while left:
        layer: list[int] = []
        inside: list[int] = []
        last = -1
        for i in left:
            (layer if lives[i].end > last else inside).append(i)
            last = max(last, lives[i].end)
        yield layer
        left = inside


def insert(line: Sequence[Op], stays: Sequence[Stay], parts: int = 1) -> tuple[Op, ...]:
    """The line with L and E before the computations they run beside, loads first.

    Of one activation the latest layers return first, the earliest leave first.  A backward with a
    transfer before one of its inner steps, or beside which its own parts return, is written part by
    part.
    """
    forwards = [op for op in line if op.kind is Kind.FORWARD]
    before: dict[int, list[Op]] = {}
    returning = sorted(stays, key=lambda s: (s.load, s.evict, s.span, -(s.part or 0)))
    for stay in returning:
        load = forwards[stay.span]._replace(kind=Kind.LOAD, part=stay.part)
        before.setdefault(stay.load, []).append(load)
    for stay in sorted(stays, key=lambda s: (s.evict, s.part or 0)):
        evict = forwards[stay.span]._replace(kind=Kind.EVICT, part=stay.part)
        before.setdefault(stay.evict, []).append(evict)
    out: list[Op] = []
    step = 0
    for op in line:
        out += before.get(step, ())
        steps = parts if op.kind is Kind.BACKWARD else 1
        inner = range(step + 1, step + steps)
        own = steps > 1 and any(one.activation == op.activation for one in before.get(step, ()))
        if own or any(at in before for at in inner):
            for part, at in zip(range(parts - 1, -1, -1), (step, *inner), strict=True):
                out += before.get(at, ()) if at > step else ()
                out.append(op._replace(part=part))
        else:
            out.append(op)
        step += steps
    return tuple(out)
