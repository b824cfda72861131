"""Schedules as text: CSV to exchange, drawings to read.

CSV has one line per stage, first stage first, and in it the ops in order; no header::

    F0,F1,E1,F2,F3,E3,B0,L1,F4,B1,...
    F0,F1,F2,B0,F3,B1,...

A drawing has one column per unit of time (F = B = 1, messages and copies free), below an
evictor's line what leaves (E) and what comes back (L) beside the computation above it::

    time        0  1  2  3  4  5  6  7  8  9
    0: max 3   F0 F1 F2 F3  .  .  . B0 F4 B1
                     E1             E3
                                       L1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_bpipe.schedule.ops import Kind, Op, Schedule, microbatches, quantity
from megatron_bpipe.schedule.programs import times
from megatron_bpipe.schedule.validation.occupancy import lent, peak, with_own_loans
from megatron_bpipe.schedule.validation.validate import validate


def to_csv(schedule: Schedule) -> str:
    """The schedule's ops as CSV; its name and budget are not part of it."""
    return "".join(",".join(map(str, line)) + "\n" for line in schedule.stages)


def from_csv(
    text: str, name: str = "csv", budget: float | None = None, parts: int | None = None
) -> Schedule:
    """Read what ``to_csv`` wrote, or a schedule written by hand, and validate it.

    Blanks around ops are allowed, blank lines are not.  The schedule counts as lowered if any op
    is.  ``parts`` (None: as many as the ops name) says how many an activation has.

    Raises ValueError naming line, column and text for what is not an op, and ScheduleError for ops
    that are no valid schedule (within ``budget`` if given).
    """
    lines = text.split("\n")
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    stages = tuple(
        _parse_line(line.removesuffix("\r"), number) for number, line in enumerate(lines, start=1)
    )
    ops = [op for line in stages for op in line]
    microbatches = len({op.microbatch for op in ops if op.kind is Kind.FORWARD})
    lowered = any(not op.kind.logical for op in ops)
    if parts is None:
        parts = 1 + max((op.part or 0 for op in ops), default=0)
    schedule = Schedule(name, microbatches, stages, budget, lowered, parts=parts)
    if any(op.other is not None for op in ops):
        schedule = with_own_loans(schedule)
    validate(schedule)
    return schedule


def _parse_line(line: str, number: int) -> tuple[Op, ...]:
    ops = []
    column = 1
    for cell in line.split(","):
        word = cell.strip(" \t")
        try:
            ops.append(Op.parse(word))
        except ValueError as error:
            at = column + len(cell) - len(cell.lstrip(" \t"))
            raise ValueError(f"line {number}, column {at}: {error}") from None
        column += len(cell) + 1
    return tuple(ops)


def draw(schedule: Schedule, width: int | None = None) -> str:
    """A drawing for the terminal, cut at ``width`` characters (None: not at all), saying so.

    "max" is the most micro-batches of a whole stage that may occupy it at any time (a chunk of v
    counts 1/v): its own and, on an acceptor, all slots it lends.  Lowered schedules are drawn as
    their messages let them run.  Raises ScheduleError if the schedule deadlocks.
    """
    over = times(schedule)
    end = max((line[-1] for line in over if line), default=0)
    columns = -(-end // schedule.parts)  # each as long as a whole computation
    rows = [_Row("time", {time: str(time) for time in range(columns)}, "")]
    for stage, (line, line_over) in enumerate(zip(schedule.stages, over, strict=True)):
        most = quantity(microbatches(_most(schedule, stage), schedule.grain))
        rows += _stage_rows(f"{stage}: max {most}", line, line_over, schedule.parts)
    label = max(len(row.label) for row in rows)
    cell = 1 + max((len(text) for row in rows for text in row.cells.values()), default=0)
    shown = columns if width is None else max(1, min(columns, (width - label) // cell))
    lines = [_title(schedule)]
    for row in rows:
        texts = (row.cells.get(time, row.idle) for time in range(shown))
        lines.append((row.label.ljust(label) + "".join(t.rjust(cell) for t in texts)).rstrip())
    if len(rows) > 1 + schedule.p:
        lines.append("E evicts, L loads beside the computation above it")
    if shown < columns:
        lines.append(f"(cut to fit: times 0 to {shown - 1} of 0 to {columns - 1})")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    """One row of a drawing: what to write at which time, and at all others."""

    label: str
    cells: dict[int, str]
    idle: str


def _stage_rows(label: str, line: Sequence[Op], over: Sequence[int], parts: int) -> list[_Row]:
    """A stage's computations, then its evictions and loads if it has any."""
    computed: dict[int, str] = {}
    moved: dict[Kind, dict[int, list[Op]]] = {Kind.EVICT: {}, Kind.LOAD: {}}
    waiting: list[Op] = []
    for op, end in zip(line, over, strict=True):
        if op.kind.computation:
            column = (end - 1) // parts
            computed[column] = str(op._replace(part=None))
            for transfer in waiting:
                moved[transfer.kind].setdefault(column, []).append(transfer)
            waiting.clear()
        elif op.kind is Kind.EVICT or op.kind is Kind.LOAD:
            waiting.append(op)
    transfers = [
        _Row("", {column: _together(ops, parts) for column, ops in cells.items()}, "")
        for cells in moved.values()
        if cells
    ]
    return [_Row(label, computed, "."), *transfers]


def _together(transfers: Sequence[Op], parts: int) -> str:
    """Transfers of one cell: ``E1/0-2`` for parts 0, 1 and 2, ``E1`` for all."""
    texts: list[str] = []
    for whole, ops in groupby(transfers, lambda op: op._replace(part=None)):
        numbers = [op.part for op in ops if op.part is not None]
        named = "" if len(numbers) in (0, parts) else f"/{numbers[0]}"
        texts.append(f"{whole}{named}" + (f"-{numbers[-1]}" if named and len(numbers) > 1 else ""))
    return "".join(texts)


def _most(schedule: Schedule, stage: int) -> int:
    """Most units on a stage, slots it lends included."""
    return peak(schedule.stages[stage], schedule.parts) + lent(schedule, stage)


def _title(schedule: Schedule) -> str:
    parts = [f"{schedule.name}: p={schedule.p}, m={schedule.microbatches}"]
    if schedule.budget is not None:
        parts.append(f"budget {quantity(schedule.budget)}")
    evictions = sum(op.kind is Kind.EVICT for line in schedule.stages for op in line)
    if evictions and schedule.parts == 1:
        parts.append(f"{evictions} evictions")
    elif evictions:
        moved = quantity(microbatches(evictions, schedule.grain))
        parts.append(f"{moved} micro-batches evicted in {schedule.parts} parts each")
    return ", ".join(parts)
