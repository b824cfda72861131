"""Balanced schedules without a flush: bitwise the same training, with the budget kept for ever."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.simulate.recorded.overlay import overlay
from megatron_bpipe.simulate.recorded.recording import read_report
from tests.harness import Megatron, Result
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt
from tests.training.schedules.test_flush_free import (
    CASES,
    DROPOUT,
    ONCE,
    STEPS,
    delay,
)

BALANCED = ["--bpipe"]


def train(megatron: Megatron, name: str, *extra: str, **more: Any) -> Result:
    case = CASES[name]
    flags = [*case.flags, "--bpipe-schedule", case.schedule, *extra]
    return megatron.train(flags, world=case.world, steps=STEPS, hooks=case.hooks, **more)


def held(result: Result) -> list[float]:
    """Micro-batches that each stage has held at most."""
    return [stage["own_microbatches"] for stage in result.memory["stages"]]


def assert_balanced(plain: Result, balanced: Result, budget: int) -> None:
    """The same training; no stage holds more than the budget, what it lends counted."""
    assert difference(plain, balanced) is None
    assert evicted(plain) == 0
    stages = balanced.memory["stages"]
    assert sum(one["evicted_bytes"] for one in stages) > 0
    assert [one["evicted_bytes"] - one["loaded_bytes"] for one in stages] == [0] * len(stages)
    assert max(held(plain)) > budget
    for stage in stages:
        assert stage["own_microbatches"] + stage["pool_slots"] <= budget, stage
    assert stages[0]["own_activation_bytes"] < plain.memory["stages"][0]["own_activation_bytes"]


def test_2bw(megatron: Megatron) -> None:
    """Over ten iterations that never flush; every steady iteration evicts as much."""
    name = "2bw, tied, dropout"
    plain, balanced = train(megatron, name), train(megatron, name, *BALANCED)
    assert_balanced(plain, balanced, 3)
    recording = read_report(balanced.out / "report")
    assert dict(overlay(recording, "2bw").facts)["bubble"].endswith("%")
    first = recording.stages[0]
    leaving = [seen.op.microbatch // 8 for seen in first if seen.op.kind is Kind.EVICT]
    assert leaving.count(4) == leaving.count(5) == 4  # 8 micro-batches, each other one


@pytest.mark.long
@pytest.mark.parametrize("transport", ["host", "p2p"])
def test_2bw_over_other_transports(megatron: Megatron, transport: str) -> None:
    name = "2bw, tied, dropout"
    balanced = train(megatron, name, *BALANCED, "--bpipe-transport", transport)
    assert balanced.memory["stages"][0]["transport"] == transport
    assert_balanced(train(megatron, name), balanced, 3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("2bw, untied, SGD", 3),
        ("2bw, m = p - 1", 3),
        ("2bw, evaluation between steps", 3),
        ("2bw, a batch size that grows", 3),
        ("2bw, full recompute with dropout", 3),
        ("2bw, gradient-accumulation fusion", 3),
        ("2bw, tp2 with sequence parallelism", 3),
        ("2bw, dp2, overlapped reduction", 3),
        ("2bw, pp8", 5),
        ("2bw, odd p", 4),
        ("pipedream, dropout", 3),
        ("continuous, m = 3, dropout", 9),
    ],
)
def test_all_others(megatron: Megatron, name: str, budget: int) -> None:
    """With and without flushes in between."""
    plain, balanced = train(megatron, name), train(megatron, name, *BALANCED)
    assert_balanced(plain, balanced, budget)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "p2p"])
def test_what_ran_ahead_of_an_unexpected_flush(megatron: Megatron, transport: str) -> None:
    """What of it had left is forgotten on both ends, and training goes on as if it never had."""
    flush = {"call": "tests.harness.delayed:flush_unexpectedly", "with": {"after": 3}}
    flags = [*gpt(4, 4, None, *ONCE), *DROPOUT]
    balanced = [*flags, "--bpipe-schedule", "pipedream-2bw", *BALANCED]
    balanced += ["--bpipe-transport", transport]
    ours = megatron.train(balanced, hooks=[flush], steps=7)
    assert difference(ours, megatron.train(flags, hooks=[delay([1] * 4, (3,))], steps=7)) is None
    evictor = ours.memory["stages"][0]
    assert evictor["loaded_bytes"] < evictor["evicted_bytes"]


@pytest.mark.long
def test_a_changed_byte_shows(megatron: Megatron) -> None:
    """The control: what returns in a later iteration is what is computed with."""
    case = CASES["2bw, untied, SGD"]  # without dropout, whose masks would hide it
    flags = [*case.flags, "--bpipe-schedule", case.schedule, *BALANCED]
    tampered = megatron.train(flags, steps=4, hooks=[TAMPER], report=False)
    assert difference(megatron.train(flags, steps=4, report=False), tampered) is not None
