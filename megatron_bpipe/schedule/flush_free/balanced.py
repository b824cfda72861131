"""Balance a schedule without a flush: in the steady state the same evictions in every call.

Stage x is p-1-x forwards ahead, for ever, so it holds what it holds in 1F1B for ever.  The fewest
evictions of a whole run have a period of their own on each stage; here each evictor has one plan a
call (`balancing.cyclic`), and calls that are alike evict and load alike.  2BW, p = 4, m = 4, stage
0 in the steady state with the budget of 3::

    F11 E11 B8 L9 F12 B9 F13 E13 B10 L11 F14 B11        E9 in the call before, L13 in the next

What of that falls into the filling or the emptying of the pipeline, where a computation beside
which something would leave or return does not exist, is planned anew there, in the room and among
the activations that are left.  The two are planned in a long run, where they have nothing to do
with each other, so that no call need know of a flush that is far away (`Patterns.horizon`).  A run
that is too short for that is planned as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_bpipe.schedule.balancing.balance import BudgetError, insert
from megatron_bpipe.schedule.balancing.cyclic import Cycle, cyclic_evictions
from megatron_bpipe.schedule.balancing.min_evictions import Span, Stay, fewest_evictions
from megatron_bpipe.schedule.flush_free.calls import calls_of
from megatron_bpipe.schedule.ops import Kind, Op, Schedule, default_budget
from megatron_bpipe.schedule.validation.occupancy import live, spans

Run = Callable[[int], Schedule]  # of so many iterations


class Place(NamedTuple):
    """A computation of a stage's line."""

    kind: Kind
    microbatch: int


class Visit(NamedTuple):
    """A stay by what it runs beside: of which micro-batch, where it leaves, where it returns."""

    microbatch: int
    evict: Place
    load: Place

    def moved(self, by: int) -> Visit:
        """The same so many micro-batches later."""
        places = (place._replace(microbatch=place.microbatch + by) for place in self[1:])
        return Visit(self.microbatch + by, *places)


@dataclass(frozen=True)
class Pattern:
    """What one evictor does.

    Attributes:
        room: slots that its acceptor has.
        each: in the steady state, for an iteration whose micro-batches count from 0.
        filling: in place of what of that would be earlier than a run begins.
        emptying: in place of what would be later than its end, from which micro-batches count back.
        ahead: how many calls before the last the emptying begins to differ.
        filled: after how many calls nothing of the filling is left.
    """

    room: int
    each: tuple[Visit, ...]
    filling: tuple[Visit, ...] = ()
    emptying: tuple[Visit, ...] = ()
    ahead: int = 0
    filled: int = 0


@dataclass(frozen=True)
class Patterns:
    """Of all evictors, for a budget in micro-batches; a stage that need not evict has None."""

    budget: int
    stages: tuple[Pattern | None, ...]

    @property
    def horizon(self) -> int:
        """How many calls before a flush must know of it.

        In a run of more calls filling and emptying have nothing to do with each other.
        """
        found = (one.ahead + max(1, one.filled) for one in self.stages if one is not None)
        return max(found, default=0)


def patterns(run: Run, m: int, iterations: int, budget: float | None) -> Patterns:
    """The plan of a schedule.

    Args:
        run: the schedule.
        m: micro-batches of an iteration.
        iterations: of a run so long that its middle one has nothing of filling and emptying.
        budget: in micro-batches; None: BPipe's, or the least above it that can be kept.

    Raises:
        BudgetError: it is too small.
    """
    long = run(iterations)
    wanted = int(default_budget(long.p) if budget is None else budget)
    found = _patterns(long, m, wanted)
    if found is not None:
        return found
    most = max(max(live(spans(line))) for line in long.stages)  # with so much none evicts
    tried = range(wanted if budget is None else 1, most + 1)
    least = next(found for one in tried if (found := _patterns(long, m, one)) is not None)
    if budget is None:
        return least
    raise BudgetError(long, budget, least.budget)


def balanced_run(schedule: Schedule, given: Patterns, m: int) -> Schedule:
    """The same computations with evictions and loads.

    Args:
        schedule: logical, of whole iterations from one flush to the next.
        given: the plan.
        m: micro-batches of an iteration.

    Raises:
        BudgetError: a short run cannot keep the budget.
    """
    lines = list(schedule.stages)
    for stage, pattern in enumerate(given.stages):
        if pattern is None:
            continue
        line = lines[stage]
        if schedule.microbatches > given.horizon * m:
            end = [visit.moved(schedule.microbatches) for visit in pattern.emptying]
            ends = _stays(line, [*pattern.filling, *end])
            lines[stage] = insert(line, [*_placed(line, pattern.each, m), *ends])
            continue
        stays = _missing(line, [], given.budget, pattern.room)
        if stays is None:
            raise BudgetError(schedule, given.budget, given.budget + 1)
        lines[stage] = insert(line, stays)
    name = f"{schedule.name}+bpipe" if any(given.stages) else schedule.name
    return replace(schedule, name=name, stages=tuple(lines), budget=given.budget)


def _patterns(long: Schedule, m: int, budget: int) -> Patterns | None:
    p = long.p
    peaks = [max(live(spans(line))) for line in long.stages]
    if max(peaks[p // 2 :]) > budget:  # acceptors and the middle stage cannot evict
        return None
    found: list[Pattern | None] = [None] * p
    for stage in range(p // 2):
        if peaks[stage] > budget:
            room = budget - peaks[p - 1 - stage]
            pattern = found[stage] = _pattern(long.stages[stage], m, budget, room)
            if pattern is None:
                return None
    return Patterns(budget, tuple(found))


def _pattern(line: Sequence[Op], m: int, budget: int, room: int) -> Pattern | None:
    """From a long line: the middle call's plan, then what its beginning and its end lack."""
    lives = spans(line)
    iterations = len(lives) // m
    first = iterations // 2 * m
    begin = lives[first - 1].end + 1
    stays = cyclic_evictions(
        Cycle(
            [Span(s.start - begin, s.end - begin) for s in lives[first : first + m]],
            [n - budget for n in live(lives)[begin : begin + 2 * m]],
            room,
        )
    )
    if stays is None:
        return None
    middle = [replace(s, span=s.span + first, evict=s.evict + begin, load=s.load + begin)
              for s in stays]  # fmt: skip
    each = tuple(visit.moved(-first) for visit in _visits(line, middle))
    fixed = _placed(line, each, m)
    more = _missing(line, fixed, budget, room)
    if more is None:
        return None
    call_of = calls_of(line, m)
    present = {stay.span for stay in fixed}
    absent = {k * m + visit.microbatch for k in range(iterations) for visit in each} - present
    filling = [stay for stay in more if stay.span < first]
    emptying = [stay for stay in more if stay.span >= first]
    late = [lives[i].start for i in absent if i >= first] + [lives[s.span].start for s in emptying]
    early = [lives[i].end for i in absent if i < first] + [stay.load for stay in filling]
    assert all(stay.load < begin for stay in filling), "filling lasts for half of a long run"
    return Pattern(
        room,
        each,
        filling=tuple(_visits(line, filling)),
        emptying=tuple(visit.moved(-len(lives)) for visit in _visits(line, emptying)),
        ahead=iterations - 1 - min((call_of[step] for step in late), default=iterations - 1),
        filled=1 + max((call_of[step] for step in early), default=-1),
    )


def _missing(
    line: Sequence[Op], fixed: Sequence[Stay], budget: int, room: int
) -> list[Stay] | None:
    """What else it takes to keep the budget all along a line; None if nothing does."""
    lives = spans(line)
    need = [n - budget for n in live(lives)]
    rooms = [room] * len(need)
    for stay in fixed:
        for step in range(stay.evict, stay.load + 1):
            rooms[step] -= 1
            need[step] -= stay.evict < step < stay.load
    taken = {stay.span for stay in fixed}
    left = [i for i in range(len(lives)) if i not in taken]
    more = fewest_evictions([lives[i] for i in left], need, rooms)
    return None if more is None else [replace(stay, span=left[stay.span]) for stay in more]


def _placed(line: Sequence[Op], each: Sequence[Visit], m: int) -> list[Stay]:
    """The steady state's stays of every iteration, as far as a line has their computations."""
    iterations = len(line) // (2 * m)
    return _stays(line, [visit.moved(k * m) for k in range(iterations) for visit in each])


def _stays(line: Sequence[Op], visits: Sequence[Visit]) -> list[Stay]:
    step_of = {Place(op.kind, op.microbatch): step for step, op in enumerate(line)}
    return [
        Stay(visit.microbatch, step_of[visit.evict], step_of[visit.load])
        for visit in visits
        if visit.evict in step_of and visit.load in step_of
    ]


def _visits(line: Sequence[Op], stays: Sequence[Stay]) -> list[Visit]:
    def place(step: int) -> Place:
        return Place(line[step].kind, line[step].microbatch)

    return [Visit(stay.span, place(stay.evict), place(stay.load)) for stay in stays]
