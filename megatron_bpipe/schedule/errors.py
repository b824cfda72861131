"""Errors that show the schedule with the failing ops marked.

stage 1, op 5: B0 before its forward F0
stage 0: F0, F1, B0, F2, B1, B2
stage 1: F1, >>>B0<<<, F0, ...
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bpipe.schedule.ops import Op, Schedule

_WINDOW = 8  # ops shown on either side of a mark in a long line
_NEAR = 1  # unmarked stages shown on either side of a marked one in a schedule of many stages
_MANY = 8  # stages
_MARKED = 12  # marked stages shown at most


class ScheduleError(ValueError):
    """A schedule that cannot run, or not within its bound.

    ``stage`` and ``index`` locate the failing op (None where one is missing or the whole stage is
    meant); the message shows the schedule around it.
    """

    def __init__(
        self,
        reason: str,
        schedule: Schedule,
        stage: int | None = None,
        index: int | None = None,
        others: Mapping[int, int] | None = None,
    ) -> None:
        """``others`` marks one more op in each of these stages (stage -> index)."""
        self.reason, self.stage, self.index = reason, stage, index
        marks: dict[int, int | None] = {**(others or {})}
        where = ""
        if stage is not None:
            marks[stage] = index
            where = f"stage {stage}" + ("" if index is None else f", op {index}") + ": "
        super().__init__(f"{where}{reason}\n{marked(schedule, marks)}")


def marked(schedule: Schedule, marks: Mapping[int, int | None]) -> str:
    """The schedule's lines, the ops at ``marks`` (stage -> index) between >>> and <<<.

    Long lines are cut to a window around their mark, many stages to those near a mark.
    """
    wanted = sorted(marks)[:_MARKED]
    shown = [
        stage
        for stage in range(schedule.p)
        if schedule.p <= _MANY or any(abs(stage - mark) <= _NEAR for mark in wanted)
    ]
    focus = next(
        (schedule.stages[stage][at] for stage, at in sorted(marks.items()) if at is not None), None
    )
    lines = [f"  stage {stage}: {_line(schedule, stage, marks, focus)}" for stage in shown]
    if len(shown) < schedule.p:
        lines.append(f"  ({schedule.p - len(shown)} of {schedule.p} stages not shown)")
    return "\n".join(lines)


def _line(schedule: Schedule, stage: int, marks: Mapping[int, int | None], focus: Op | None) -> str:
    """One line, if long only what is near its mark or near the micro-batch of ``focus``."""
    line, mark = schedule.stages[stage], marks.get(stage)
    first, last = 0, len(line)
    if len(line) > 4 * _WINDOW:
        middle = mark
        if middle is None:
            same = (at for at, op in enumerate(line) if focus and op.microbatch == focus.microbatch)
            middle = next(same, 0)
        first, last = max(0, middle - _WINDOW), min(len(line), middle + _WINDOW + 1)
    texts = [
        f">>>{line[index]}<<<" if index == mark else str(line[index])
        for index in range(first, last)
    ]
    if first > 0:
        texts.insert(0, f"({first} ops) ...")
    if last < len(line):
        texts.append(f"... ({len(line) - last} ops)")
    return ", ".join(texts)
