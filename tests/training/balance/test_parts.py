"""Activations in parts: training is bitwise stock's, and less stays on the fullest stage.

Every case asserts that something left in parts and that no stage exceeded its budget, which counts
live storages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpipe.simulate.recorded.overlay import overlay
from megatron_bpipe.simulate.recorded.recording import read_report
from tests.harness import Megatron
from tests.harness.compare import difference, evicted
from tests.harness.models import ALLOCATOR, DATA_LOADERS, TAMPER, gpt
from tests.harness.stand_in_gpu import INSTEAD, NEEDS_COMPILER
from tests.training.combinations import COMBINATIONS, FUSION
from tests.training.schedules.test_interleaved import COMBINATIONS as INTERLEAVED
from tests.training.schedules.test_interleaved import four as chunked

FOUR = ["--bpipe", "--bpipe-parts", "4"]
LEAST = [*FOUR, "--bpipe-budget", "2.75"]
RECOMPUTED = 0.5  # one recomputed layer, two storages: its input, and what dropout makes of it
DEEP = gpt(4, 12, 16)  # four layers a stage, so that parts are layers


DATA = 8 * 2 * (2 * 64 * 8)  # token and position ids of 8 micro-batches, held to the end
INPUT = 2 * 64 * 64 * 4  # of one stage, which the loop that runs it holds a forward longer


def assert_bound_in_bytes(run: Any, blocks: int) -> None:
    """Live storage of every stage, the lent pool included, within what the sizes promised.

    The pool of a lender: units times a unit, and a storage for each activation partly there.
    """
    parts = run.memory["parts"]
    for stage in run.memory["stages"]:
        assert stage["peak_activation_bytes"] <= stage["bound_bytes"] + DATA + INPUT
        partner = run.memory["stages"][-1 - stage["stage"]]
        unit = max(partner["leaving_bytes"]) / parts
        units = stage["pool_slots"] * len(partner["leaving_bytes"]) * parts
        block = 64 * 2 * 256 * 4  # the largest storage: the MLP's 4h, fp32
        assert stage["pool_bytes"] <= 1.01 * (units * unit + blocks * block)


def check(stock: Any, parts: Any, block: float = 0.25) -> None:
    """Equal, something left, and no evictor above the bound.

    ``block``: the largest storage, in micro-batches: a backward frees it whole, so a part may be
    freed that much later than the schedule counts.
    """
    assert difference(stock, parts) is None
    assert evicted(stock) == 0
    assert evicted(parts) > 0
    budget = parts.memory["budget"]
    for before, stage in zip(stock.memory["stages"], parts.memory["stages"], strict=True):
        assert stage["evicted_bytes"] == stage["loaded_bytes"]
        if stage["evicted_bytes"]:
            assert stage["own_microbatches"] <= budget + block
        else:
            assert stage["own_activation_bytes"] <= 1.02 * before["own_activation_bytes"]
            assert stage["pool_slots"] <= budget


def test_pp4_in_2_75_micro_batches(megatron: Megatron) -> None:
    """Least memory, measured on live storages, within one block of units times a unit's bytes."""
    stock = megatron.train(DEEP, steps=3)
    least = megatron.train([*DEEP, *LEAST], steps=3)
    check(stock, least)
    memory = least.memory
    assert (memory["budget"], memory["parts"]) == (2.75, 4)
    before, after = stock.memory["stages"], memory["stages"]
    for x in (0, 1):
        micro_batch = before[x]["own_activation_bytes"] / (4 - x)
        block = 64 * 2 * 256 * 4  # the largest storage: the MLP's 4h, fp32
        assert after[x]["own_activation_bytes"] <= 2.75 * micro_batch + block
        fall = before[x]["allocator_peak_bytes"] - after[x]["allocator_peak_bytes"]
        assert fall > 0.7 * (before[x]["own_activation_bytes"] - after[x]["own_activation_bytes"])
        assert after[x]["bound_bytes"] < before[x]["own_activation_bytes"] or x
    assert_bound_in_bytes(least, blocks=4)
    names = {event["op"] for event in least.timeline(0)["iterations"][-1]}
    assert {"E3/0", "EW3/0", "L3/0", "LW3/0", "B3/3", "B3/0"} <= names


def test_the_recording_lies_over_its_prediction(megatron: Megatron) -> None:
    """Same boxes and moves as foretold, a backward in parts is one box, budgets agree."""
    least = megatron.train([*DEEP, *LEAST], steps=3)
    panel = overlay(read_report(least.out / "report"), "parts")
    ghost = panel.ghost
    assert ghost is not None
    for drawn, foretold in ((panel.boxes, ghost.boxes), (panel.moves, ghost.moves)):
        assert sorted(one.op for one in drawn) == sorted(one.op for one in foretold)
    assert {"E3/0", "L3/0"} <= {move.op for move in panel.moves}
    for curve, stage in zip(panel.curves, least.memory["stages"], strict=True):
        assert curve.peak <= stage["peak_activation_bytes"]
        assert curve.budget is not None
    assert all(move.size > 0 for move in panel.moves)


def test_less_travels_at_the_published_budget(megatron: Megatron) -> None:
    stock = megatron.train(DEEP, steps=3)
    whole = megatron.train([*DEEP, "--bpipe", "--bpipe-parts", "1"], steps=3)
    parts = megatron.train([*DEEP, *FOUR], steps=3)
    check(stock, parts)
    assert parts.memory["budget"] == whole.memory["budget"] == 3
    assert 0.6 * evicted(whole) < evicted(parts) < 0.7 * evicted(whole)  # 4 of 6 micro-batches


def test_one_flipped_bit_is_seen(megatron: Megatron) -> None:
    stock = megatron.train(DEEP, steps=3)
    tampered = megatron.train([*DEEP, *LEAST], steps=3, hooks=[TAMPER])
    assert difference(stock, tampered) is not None


@pytest.mark.long
@pytest.mark.parametrize("parts", ["2", "3", "8"])
def test_other_numbers_of_parts(megatron: Megatron, parts: str) -> None:
    budget = {"2": "3", "3": "2.667", "8": "2.5"}[parts]
    flags = [*DEEP, "--bpipe", "--bpipe-parts", parts, "--bpipe-budget", budget]
    check(megatron.train(DEEP, steps=3), megatron.train(flags, steps=4))


@pytest.mark.long
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination(megatron: Megatron, name: str) -> None:
    case = COMBINATIONS[name]
    stock = megatron.train(case.flags, world=case.world, hooks=case.hooks)
    parts = megatron.train([*case.flags, *FOUR], world=case.world, hooks=case.hooks)
    check(stock, parts, RECOMPUTED if name.startswith("full recompute") else 0.25)


@pytest.mark.long
@pytest.mark.parametrize("name", INTERLEAVED)
def test_every_combination_interleaved(megatron: Megatron, name: str) -> None:
    case = INTERLEAVED[name]
    stock = megatron.train(case.flags, world=case.world, hooks=case.hooks)
    parts = megatron.train([*case.flags, *FOUR], world=case.world, hooks=case.hooks)
    check(stock, parts, RECOMPUTED if name.startswith("full recompute") else 0.25)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full recompute with dropout", "as much as 2.0 of its 4 parts"),
        ("gradients of the output layer deferred", "--bpipe-budget does not count them"),
    ],
)
def test_where_more_stays_is_said(megatron: Megatron, name: str, said: str) -> None:
    case = COMBINATIONS[name]
    parts = megatron.train([*case.flags, *FOUR], world=case.world, hooks=case.hooks)
    assert said in parts.log(0)
    plain = megatron.train([*DEEP, *FOUR], steps=3)
    assert said not in plain.log(0)


def test_interleaved_below_one_chunk(megatron: Megatron) -> None:
    """PP 4 of two chunks keeps 4 micro-batches of a stage, where whole chunks need 4.5."""
    stock = megatron.train(chunked())
    least = megatron.train([*chunked(), *FOUR, "--bpipe-budget", "4"])
    check(stock, least)
    assert max(stage["peak_microbatches"] for stage in least.memory["stages"]) == 4
    assert_bound_in_bytes(least, blocks=4)  # the last chunk has the head, the first an embedding


@pytest.mark.long
@pytest.mark.parametrize("transport", ["p2p", "host"])
@pytest.mark.parametrize("flags", [DEEP, chunked()], ids=["1F1B", "interleaved"])
def test_over(megatron: Megatron, flags: list[str], transport: str) -> None:
    budget = "2.75" if flags is DEEP else "4"
    other = [*flags, *FOUR, "--bpipe-budget", budget, "--bpipe-transport", transport]
    check(megatron.train(flags, steps=3), megatron.train(other, steps=4))


@pytest.mark.long
@pytest.mark.parametrize("first", ["stock", "parts"])
def test_resume_across_parts_on_and_off(megatron: Megatron, tmp_path: Path, first: str) -> None:
    """Two steps with, two without, from a checkpoint: what four steps of stock give."""
    begin, go_on = (DEEP, [*DEEP, *LEAST]) if first == "stock" else ([*DEEP, *LEAST], DEEP)
    save = ["--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2"]
    begun = megatron.train([*begin, *save], steps=4, dump_at=2)
    assert begun.ok, begun.logs
    resumed = megatron.train([*go_on, "--load", str(tmp_path)], steps=4, dump_at=2)
    assert resumed.ok, resumed.logs
    assert evicted(begun if first == "parts" else resumed) > 0
    whole = megatron.train(DEEP, steps=4)
    for one, another in zip(whole.states, resumed.states, strict=True):
        for name in ("params", "grads"):
            assert one[name].keys() == another[name].keys()
            assert all(map(torch.equal, one[name].values(), another[name].values()))
    losses = [step["lm loss"] for step in whole.states[-1]["losses"]]
    halves = [step["lm loss"] for run in (begun, resumed) for step in run.states[-1]["losses"]]
    assert len(halves) == 4
    assert all(map(torch.equal, losses, halves))


@pytest.mark.long
def test_zero_bubble(megatron: Megatron) -> None:
    flags = gpt(4, 8, 8)
    stock = megatron.train(flags, hooks=[FUSION])
    parts = [*flags, *FOUR, "--bpipe-schedule", "zb-h1"]
    assert difference(stock, megatron.train(parts, hooks=[FUSION])) is None


@pytest.mark.long
def test_the_allocator_agrees(megatron: Megatron) -> None:
    result = megatron.train([*DEEP, *LEAST, *DATA_LOADERS], steps=3, hooks=[ALLOCATOR])
    assert result.ok, result.logs


@NEEDS_COMPILER
@pytest.mark.long
@pytest.mark.parametrize(("transport", "replaced"), [("ipc", "shm"), ("nccl", "p2p")])
def test_on_the_stand_in_for_gpus(megatron: Megatron, transport: str, replaced: str) -> None:
    """Every copy is made as late as the events allow: a part used too early would show."""
    hook = {"call": INSTEAD, "with": {"transport": transport}}
    flags = [*DEEP, *LEAST, "--bpipe-transport", replaced]
    check(megatron.train(DEEP, steps=3), megatron.train(flags, steps=4, hooks=[hook]))
