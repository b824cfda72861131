"""When to evict and load: the exact answer for one evictor.

The evictor is a cache of its own activations and its future is known, so this is paging (paper,
section 2.2: "sends an activation", "loads the activation").  Time is counted in *steps*: step t
is the t-th computation of the stage's line.  One activation whose forward is step 2 and whose
backward is step 9, evicted beside step 4 and loaded beside step 7::

    step        2   3   4   5   6   7   8   9
    compute     F                           B
    transfer            E           L
    evictor     #   #   #   .   .   #   #   #     counts here: also while it travels
    acceptor    .   .   #   #   #   #   .   .     its slot: also while it travels

Choose activations and steps such that at every step t

* at least ``need[t]`` activations are away from the evictor (the row of dots), and
* at most ``room[t]`` occupy slots of the acceptor,

with the fewest evictions.  Write E[t] and L[t] for how many evictions and loads have begun up to
and including step t, and P[i] for how many of the first i activations are evicted at all.  When
backwards come in the order of the forwards, k-th eviction, k-th load and k-th chosen activation
belong together, and every condition is a difference of two unknowns::

    E[t-1] - L[t]   >= need[t]      enough away
    E[t]   - L[t-1] <= room[t]      not too many slots
    E[t]   <= P[started before t]   evict only what is there
    L[t]   >= P[needed by t+1]      load before the backward
    0 <= P[i] - P[i-1] <= 1         each activation once; E and L never fall

An activation may be cut into u parts, one unit each, part 0 from the earliest layers.  Everything
then counts units, a backward has u steps, and step j of it needs and frees part u-1-j.  Of an
activation of which c units leave these are the parts 0 to c-1, so that part k, needed at step
end + u-1-k, is the last but k to come back::

    P[i] - P[i-1] <= u
    L[t] >= P[i] - k                t = end + u-2-k, for each part k of activation i

Read as "at least" rules such a system has a least solution, reached by raising from zero whatever
is too small.  The least P is the fewest evictions; among those the least E and L are the latest
evictions and the latest loads, and the activations chosen are the latest possible: BPipe's
"evict the latest micro-batch" (Belady's rule), with exactly as much looking ahead as ``room``
requires.  If P[0] would have to rise above zero there is no solution.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One activation's life in steps: its forward is ``start``, its backward begins at ``end``.

    Where weight gradients are computed apart ``last`` is their step, until which the activation
    occupies memory.
    """

    start: int
    end: int
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Stay:
    """One eviction: which span (by index), the step its E runs beside, the step its L does.

    ``part`` says which part of the activation leaves; None: all of it.
    """

    span: int
    evict: int
    load: int
    part: int | None = None


def fewest_evictions(
    spans: Sequence[Span], need: Sequence[int], room: Sequence[int], parts: int = 1
) -> list[Stay] | None:
    """The fewest stays, latest first choice, that satisfy ``need`` and ``room``; None if none do.

    ``need`` and ``room`` count units: activations, or parts of them where ``parts`` is more than 1;
    a backward then has so many steps.  ``spans`` must be in order of both ``start`` and ``end``
    (ValueError otherwise).  Among solutions with the fewest evictions one is preferred in which no
    more than one activation's worth leaves, or comes back, beside the same computation.
    """
    if any(a.start >= b.start or a.end >= b.end for a, b in itertools.pairwise(spans)):
        raise ValueError("spans must be in order of both start and end")
    free = _Pace(parts)
    best = _solve(spans, need, room, free)
    if best is None or (parts == 1 and _spread(best)):
        return best
    one_each = [1] * len(need)
    if parts > 1:
        for step in set(range(len(need))) - {s.end + n for s in spans for n in range(parts)}:
            one_each[step] = parts  # a whole computation
    for pace in (_Pace(parts, one_each, one_each), _Pace(parts, one_each)):
        other = _solve(spans, need, room, pace)
        if other is not None and len(other) == len(best):
            return other
    return best


@dataclass(frozen=True, slots=True)
class _Pace:
    """How many ``parts`` an activation has, and how many may begin to leave, and to return, beside
    each step (None: any number).
    """

    parts: int
    evictions: Sequence[int] | None = None
    loads: Sequence[int] | None = None


def _spread(stays: Sequence[Stay]) -> bool:
    """Whether no two stays begin, and no two end, beside the same computation."""
    return len({s.evict for s in stays}) == len(stays) == len({s.load for s in stays})


def _solve(
    spans: Sequence[Span], need: Sequence[int], room: Sequence[int], pace: _Pace
) -> list[Stay] | None:
    """The least solution as stays, None if there is none."""
    unknowns = _Unknowns(spans, need, room, pace)
    if not all(unknowns.open(step) for step in range(len(need))):
        return None
    chosen, evictions, loads = map(_rises, (unknowns.chosen, unknowns.evictions, unknowns.loads))
    if pace.parts == 1:
        return [Stay(*stay) for stay in zip(chosen, evictions, loads, strict=True)]
    stays: list[Stay] = []
    for span, count in Counter(chosen).items():
        here = slice(len(stays), len(stays) + count)
        stays += _stays_of(span, evictions[here], loads[here])
    return stays


def _stays_of(span: int, evictions: Sequence[int], loads: Sequence[int]) -> list[Stay]:
    """The stays of one activation's parts, from the steps at which any of them leave and return.

    The latest layers return first.  The earliest leave first, unless one part would have to return
    while others are still to leave: then they leave in the order in which they return.
    """
    parts = range(len(loads) - 1, -1, -1)  # in order of their return
    leave = evictions[::-1]
    if any(evict >= load for evict, load in zip(leave, loads, strict=True)):
        leave = evictions
    return [Stay(span, e, load, part) for part, e, load in zip(parts, leave, loads, strict=True)]


def _rises(counts: Sequence[int]) -> list[int]:
    """Where a cumulative count rises, each place as often as it rises by one there."""
    return [place for place, (a, b) in enumerate(itertools.pairwise(counts)) for _ in range(b - a)]


class _Unknowns:
    """E, L and P, raised from zero as far as the rules require.

    Solved from left to right: opening a step adds its rules; what is then too small is raised,
    which may require something a little earlier to rise, and so on.  Such repairs seldom reach
    far back, so that the whole takes time proportional to the number of steps.

    ``evictions[t+1]`` is E[t]: ``evictions[0]`` and ``loads[0]`` stand for "before step 0" and,
    like ``chosen[0]``, must stay zero.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        need: Sequence[int],
        room: Sequence[int],
        pace: _Pace,
    ) -> None:
        self.need, self.room, self.pace = need, room, pace
        self.before = [span.end - 1 for span in spans]  # the last step before a backward
        self.started = 0  # spans that started before the newest step
        self.due = 0  # spans whose backward begins after the newest step, or began earlier
        self.starts = [span.start for span in spans]
        self.there: list[int] = []  # ``started`` of every step so far
        self.evictions, self.loads, self.chosen = [0], [0], [0]

    def open(self, step: int) -> bool:
        """Add the rules of the next step; False if they cannot be satisfied."""
        spans = len(self.starts)
        while self.started < spans and self.starts[self.started] < step:
            self.started += 1
            self.chosen.append(self.chosen[-1])
        while self.due < spans and self.before[self.due] <= step:
            self.due += 1
        self.there.append(self.started)
        evicted, loaded = self.evictions[-1], self.loads[-1]
        self.evictions.append(evicted)
        self.loads.append(loaded)
        due = max(loaded, self._due(step))
        away, lent = max(self.need[step], 0), self.room[step]
        if due == loaded and away <= evicted - loaded <= lent:
            return True
        return self._raise(
            [
                (self.loads, step + 1, due),
                (self.evictions, step, due + away),
                (self.loads, step, evicted - lent),
            ]
        )

    def _due(self, step: int) -> int:
        """How many units must have begun to return by this step."""
        due = min(self.due, self.started)
        if self.pace.parts == 1 or due == 0:
            return self.chosen[due]
        later = max(0, self.pace.parts - 1 - (step - self.before[due - 1]))
        return max(self.chosen[due - 1], self.chosen[due] - later)

    def _raise(self, todo: list[tuple[list[int], int, int]]) -> bool:
        """Raise (unknown, index, least value) and whatever that requires; False if impossible."""
        evictions, loads, chosen = self.evictions, self.loads, self.chosen
        parts, most = self.pace.parts, (self.pace.evictions, self.pace.loads)
        while todo:
            unknown, index, value = todo.pop()
            if unknown[index] >= value:
                continue
            if index == 0:
                return False
            unknown[index] = value
            if index + 1 < len(unknown):
                todo.append((unknown, index + 1, value))
            step = index - 1
            if unknown is chosen:
                todo.append((chosen, index - 1, value - parts))
                first = self.before[index - 1] + 1
                for later in range(parts):
                    if first + later < len(loads):
                        todo.append((loads, first + later, value - (parts - 1 - later)))
            elif unknown is evictions:
                todo.append((chosen, self.there[step], value))
                todo.append((loads, step, value - self.room[step]))
                if most[0] is not None:
                    todo.append((evictions, step, value - most[0][step]))
            else:
                todo.append((evictions, step, value + max(self.need[step], 0)))
                if most[1] is not None:
                    todo.append((loads, step, value - most[1][step]))
        return True
