"""Timetables in unit time, as papers print them: one column a unit, F = B = W = 1.

``late=True`` puts every forward as late as it can stand without moving any backward, which is how
the ContinuousPipe draft prints PipeDream::

    early   F0 F1 F2 F3  .  .  . B0 F4        late   F0  . F1  . F2  . F3 B0 F4
"""

from __future__ import annotations

from collections import defaultdict

from megatron_bpipe.schedule.lowering.routes import Place, known_activations, upstream
from megatron_bpipe.schedule.ops import Kind, Op, Schedule
from megatron_bpipe.schedule.programs import times


def timetable(schedule: Schedule, late: bool = False) -> list[list[Op | None]]:
    """For each stage what it computes in each unit of time (None: idle).

    Raises ValueError for a lowered schedule, whose messages would count.
    """
    if schedule.lowered:
        raise ValueError(f"{schedule.name} is lowered: a timetable is of the logical schedule")
    over = times(schedule)
    length = max(max(line, default=0) for line in over)
    if late:
        over = _latest(schedule, over, length)
    rows: list[list[Op | None]] = [[None] * length for _ in schedule.stages]
    for row, line, ends in zip(rows, schedule.stages, over, strict=True):
        for op, end in zip(line, ends, strict=True):
            if op.kind.computation:
                row[end - 1] = op
    return rows


def _latest(schedule: Schedule, over: list[list[int]], length: int) -> list[list[int]]:
    """The latest end of each forward, backwards fixed: from the last ops back to what they need."""
    p, known = schedule.p, known_activations(schedule)
    bound: dict[Place, int] = defaultdict(lambda: length)
    after = [length] * p  # when the stage's next op begins
    order = sorted(
        ((over[x][n], n, x) for x, line in enumerate(schedule.stages) for n in range(len(line))),
        reverse=True,
    )
    late = [list(line) for line in over]
    for _, index, stage in order:
        op = schedule.stages[stage][index]
        if not op.kind.computation:
            continue
        end = late[stage][index]
        if op.kind is Kind.FORWARD:
            end = late[stage][index] = min(after[stage], bound[stage, op.activation])
            source = upstream((stage, op.activation), p, known)
            if source is not None:
                bound[source] = min(bound[source], end - 1)
        after[stage] = end - 1
    return late
