"""The fewest evictions of a stage that never empties: the same ones in every period.

The rules are those of `min_evictions` for a line that has no beginning and no end, in which every
``period`` steps do the same for the next ``count`` activations.  E, L and P count as there, so they
rise by the same number of evictions c from one period to the next::

    E[t + period] = E[t] + c        L[t + period] = L[t] + c        P[i + count] = P[i] + c

For a given c that leaves one period of unknowns and rules between them, each of the kind "at least
that other one plus a number".  Raised from P[0] = 0 they settle, or P[0] itself would have to rise:
then no plan has c evictions a period, and c + 1 is tried.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_bpipe.schedule.balancing.min_evictions import Span, Stay

_E, _L, _P = range(3)
_Place = tuple[int, int]  # which unknown, its index within the first period


@dataclass(frozen=True)
class Cycle:
    """One stage in the steady state.

    Attributes:
        spans: of the ``count`` activations of one period, in order; their forwards may lie in the
            period before step 0, their backwards in later ones.
        need: for each step of a period how many activations must be away.
        room: slots that there are.
    """

    spans: Sequence[Span]
    need: Sequence[int]
    room: int

    @property
    def period(self) -> int:
        """In steps."""
        return len(self.need)

    @property
    def count(self) -> int:
        """Activations in a period."""
        return len(self.spans)


def cyclic_evictions(cycle: Cycle) -> list[Stay] | None:
    """The fewest stays a period that keep ``need`` and ``room`` at every step; None if none do.

    A stay's span is one of the cycle's, its steps count on from step 0 of the same period.  At most
    one begins beside a step and at most one ends, where that takes no more evictions.
    """
    away = max(span.end - span.start - 3 for span in cycle.spans)
    if max(cycle.need) <= 0:
        return []
    if away < 1:
        return None
    least = -(-sum(max(0, n) for n in cycle.need) // away)
    for evictions in range(least, cycle.count + 1):
        for one_each in (True, False):
            values = _solve(cycle, evictions, one_each)
            if values is not None:
                return _stays(cycle, evictions, values)
    return None


def _stays(cycle: Cycle, evictions: int, values: Sequence[Sequence[int]]) -> list[Stay]:
    """The k-th chosen activation, eviction and load belong together."""
    chosen = [
        span
        for span in range(cycle.count)
        for _ in range(_value(cycle, evictions, values, _P, span + 1) - values[_P][span])
    ]
    return [
        Stay(
            span,
            _rise(cycle, evictions, values, _E, number),
            _rise(cycle, evictions, values, _L, number),
        )
        for number, span in enumerate(chosen, start=1)
    ]


def _rise(
    cycle: Cycle, evictions: int, values: Sequence[Sequence[int]], which: int, number: int
) -> int:
    """The first step at which an unknown has reached a number."""
    step = (number - 1 - values[which][0]) // evictions * cycle.period  # still below it
    while _value(cycle, evictions, values, which, step) < number:
        step += 1
    return step


def _value(
    cycle: Cycle, evictions: int, values: Sequence[Sequence[int]], which: int, at: int
) -> int:
    turns, index = divmod(at, cycle.count if which == _P else cycle.period)
    return values[which][index] + turns * evictions


def _solve(cycle: Cycle, evictions: int, one_each: bool) -> list[list[int]] | None:
    """E, L and P of one period for so many evictions; None if there are none."""
    unreached = -(cycle.count + cycle.period) * (evictions + 2) - sum(map(abs, cycle.need)) - 1
    values = [[unreached] * cycle.period, [unreached] * cycle.period, [unreached] * cycle.count]
    follow: dict[_Place, list[tuple[_Place, int]]] = {}
    sizes = cycle.period, cycle.period, cycle.count
    for (target, i), (source, j), more in _rules(cycle, one_each):
        (turns, at), (others, origin) = divmod(i, sizes[target]), divmod(j, sizes[source])
        weight = more + (others - turns) * evictions
        follow.setdefault((source, origin), []).append(((target, at), weight))
    values[_P][0] = 0
    todo: deque[_Place] = deque([(_P, 0)])
    waiting = {(_P, 0)}
    while todo:
        place = todo.popleft()
        waiting.discard(place)
        value = values[place[0]][place[1]]
        for (which, index), weight in follow.get(place, ()):
            if values[which][index] < value + weight:
                if (which, index) == (_P, 0):
                    return None
                values[which][index] = value + weight
                if (which, index) not in waiting:
                    waiting.add((which, index))
                    todo.append((which, index))
    return values


def _rules(cycle: Cycle, one_each: bool) -> Iterator[tuple[_Place, _Place, int]]:
    """(this, that, number): this is at least that plus the number; indices may leave the period."""
    for i in range(cycle.count):
        yield (_P, i + 1), (_P, i), 0
        yield (_P, i), (_P, i + 1), -1
    for step in range(cycle.period):
        yield (_E, step - 1), (_L, step), max(0, cycle.need[step])
        yield (_L, step - 1), (_E, step), -cycle.room
        yield (_P, _below(cycle, [s.start for s in cycle.spans], step)), (_E, step), 0
        yield (_L, step), (_P, _below(cycle, [s.end for s in cycle.spans], step + 2)), 0
        for which in (_E, _L):
            yield (which, step), (which, step - 1), 0
            if one_each:
                yield (which, step - 1), (which, step), -1


def _below(cycle: Cycle, steps: Sequence[int], limit: int) -> int:
    """How many activations, counted from the period's first, have their ``steps`` below a limit."""
    turns = (limit - 1 - steps[0]) // cycle.period
    turns += steps[0] + turns * cycle.period < limit
    at = (turns - 1) * cycle.count
    while steps[at % cycle.count] + at // cycle.count * cycle.period < limit:
        at += 1
    return at
