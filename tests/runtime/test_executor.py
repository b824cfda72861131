"""What surrounds the ops of a run: ranges for a profiler, observers, the note of a failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_bpipe.runtime.executor import ScheduleExecutor
from megatron_bpipe.schedule import lower, one_f_one_b
from megatron_bpipe.schedule.lowering.lower import batches


class Stage:
    """Does nothing, or fails at one kind of op."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at

    def __getattr__(self, name: str) -> Any:
        def act(*ops: object) -> None:
            if name == self.fails_at:
                raise ValueError("no")

        return act


class Observer:
    def __init__(self) -> None:
        self.done: list[str] = []

    def op_done(self, op: object, start: float, end: float, moved: int) -> None:
        self.done.append(str(op))

    def forward_begins(self, op: object) -> None:
        self.done.append(f"<{op}")

    def forward_done(self, op: object, output: object) -> None:
        self.done.append(f"{op}>")


OPS = lower(one_f_one_b(3, 4)).stages[1]


def test_each_op_runs_in_a_range_with_its_own_text() -> None:
    texts: list[str] = []
    open_now: list[str] = []

    @contextlib.contextmanager
    def range_of(text: str) -> Iterator[None]:
        assert not open_now
        open_now.append(text)
        yield
        texts.append(open_now.pop())

    ScheduleExecutor(OPS, Stage(), range_of=range_of).run()
    assert texts == [" ".join(map(str, group)) for group in batches(OPS)]
    assert any(text.startswith("SF") and "RB" in text for text in texts)


def test_all_observers_hear_of_every_op() -> None:
    observers = [Observer(), Observer()]
    ScheduleExecutor(OPS, Stage(), observers=observers).run()
    assert observers[0].done == observers[1].done
    assert [text for text in observers[0].done if text[0] != "<" and text[-1] != ">"] == [
        str(op) for op in OPS
    ]


def test_a_failure_is_noted_with_its_op_and_closes_the_range() -> None:
    closed: list[str] = []

    @contextlib.contextmanager
    def range_of(text: str) -> Iterator[None]:
        try:
            yield
        finally:
            closed.append(text)

    with pytest.raises(ValueError, match="no") as caught:
        ScheduleExecutor(OPS, Stage("backward"), range_of=range_of).run()
    assert ">>>B0<<<" in caught.value.__notes__[0]
    assert closed[-1] == "B0"
