"""What would be gained if units could leave while their own forward still runs: by trying all.

Here a forward has as many steps as a backward: its activation comes into being unit by unit, the
earliest layers' first, and a unit may leave from the step after its own on. Nothing executes this.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_bpipe.schedule import Kind, Op, one_f_one_b


def lives(line: Sequence[Op], u: int) -> tuple[list[tuple[int, int]], int]:
    """The first step of each forward and backward, and the number of steps."""
    first, end, step = {}, {}, 0
    for op in line:
        (first if op.kind is Kind.FORWARD else end)[op.microbatch] = step
        step += u
    return [(first[i], end[i]) for i in first], step


def fewest(line: Sequence[Op], u: int, budget: int, room: int, inside: bool) -> int | None:
    """Fewest units that one evictor sends away, None if it cannot keep ``budget`` units.

    ``inside``: units may leave during their own forward; otherwise it counts whole from its start.
    """
    spans, steps = lives(line, u)
    best = {(0,) * len(spans): 0}  # units away of each activation, those that are needed last
    for t in range(steps):
        alive = [i for i, (first, end) in enumerate(spans) if first <= t <= end + u - 1]
        there = 0
        for first, end in (spans[i] for i in alive):
            born = min(u, t - first + 1) if inside else u
            there += min(born, u - max(0, t - end))
        new: dict[tuple[int, ...], int] = {}
        for away, cost in best.items():
            if any(away[i] and t > spans[i][1] + u - 1 - away[i] for i in alive):
                continue  # the unit needed next is away
            choices = []
            for i in alive:
                first, end = spans[i]
                done = min(u, t - first) if inside else u * (t >= first + u)
                able = max(away[i], done) if t < end else away[i]
                choices.append(
                    [(n, 0) for n in range(able - away[i] + 1)]
                    + [(0, n) for n in range(1, away[i] + 1)]
                )
            for pick in itertools.product(*choices):
                out, back = (sum(each[n] for each in pick) for n in (0, 1))
                if sum(away) + out > room or there - sum(away) + back > budget:
                    continue
                after = list(away)
                for i, (o, b) in zip(alive, pick, strict=True):
                    after[i] += o - b
                key = tuple(after)
                new[key] = min(new.get(key, cost + out), cost + out)
        best = new
    return best.get((0,) * len(spans))


def moved(p: int, m: int, u: int, units: int, inside: bool) -> float | None:
    """Micro-batches that all evictors of 1F1B send away at least; None if ``units`` are too few."""
    total = 0
    for x, line in enumerate(one_f_one_b(p, m).stages[: p // 2]):
        found = fewest(line, u, units, units - u * min(m, x + 1), inside)
        if found is None:
            return None
        total += found
    return total / u


def least(p: int, m: int, u: int, inside: bool) -> float:
    """The least budget in micro-batches."""
    units = range((p + 1) * u // 2, p * u + 1)
    return next(n for n in units if moved(p, m, u, n, inside) is not None) / u
