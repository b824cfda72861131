"""Training under BPipe is bitwise what stock Megatron does.

Every case asserts that something was evicted: a run that moved nothing would prove nothing. And
one flipped bit in what comes back must show, or the comparison is blind.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import Megatron, Result
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt
from tests.training.combinations import COMBINATIONS, GROWING, cases


@pytest.mark.parametrize("name", cases(COMBINATIONS))
def test_bitwise_equal(megatron: Megatron, name: str) -> None:
    case = COMBINATIONS[name]
    stock = megatron.train(case.flags, world=case.world, hooks=case.hooks)
    bpipe = megatron.train([*case.flags, "--bpipe"], world=case.world, hooks=case.hooks)
    assert difference(stock, bpipe) is None
    assert evicted(stock) == 0
    assert evicted(bpipe) > 0
    for stage in bpipe.memory["stages"]:
        assert stage["evicted_bytes"] == stage["loaded_bytes"]
        assert stage["peak_microbatches"] <= bpipe.memory["budget"]


def microbatches(result: Result) -> list[int]:
    """Forwards of stage 0 in each iteration."""
    iterations = result.timeline(0)["iterations"]
    return [sum(event["op"].startswith("F") for event in events) for events in iterations]


@pytest.mark.long
def test_the_batch_grows_in_the_case_that_says_so(megatron: Megatron) -> None:
    """Counted in runs: a release that ignored the flag would make the case above test nothing."""
    case = COMBINATIONS[GROWING]
    wanted = [3, 3, 5, 5, 5, 8, 8, 8, 8, 8][: megatron.steps]
    for extra in ([], ["--bpipe"]):
        found = microbatches(megatron.train([*case.flags, *extra]))
        assert found == wanted[-len(found) :]  # the report has the last iterations
        assert len(set(found)) > 1


@pytest.mark.long
def test_weight_gradients_are_fused_in_the_cases_that_say_so(megatron: Megatron) -> None:
    """Counted in the stand-in's kernel: 4 matrices of a layer and the head, 16 micro-batches."""
    case = COMBINATIONS["dp2 distributed optimizer, overlaps, gradient-accumulation fusion"]
    for extra in ([], ["--bpipe"], ["--bpipe-schedule", "zb-h1"]):
        run = megatron.train([*case.flags, *extra], world=case.world, hooks=case.hooks)
        assert run.ok, run.logs
        found = [int((run.out / f"fused{rank}.json").read_text()) for rank in range(case.world)]
        assert found == [32] * 6 + [40] * 2, extra


TWO_SIDED = ["pp4", "pp8", "tp2 with sequence parallelism", "m < p", "odd p, 5"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "pp4" else pytest.mark.long) for n in TWO_SIDED]
)
def test_bitwise_equal_over_messages(megatron: Megatron, name: str) -> None:
    """The two-sided transport, for pairs that share no memory."""
    over(megatron, name, "p2p")


@pytest.mark.long
@pytest.mark.parametrize("name", TWO_SIDED)
def test_bitwise_equal_over_host_memory(megatron: Megatron, name: str) -> None:
    over(megatron, name, "host")


def over(megatron: Megatron, name: str, transport: str) -> None:
    case = COMBINATIONS[name]
    stock = megatron.train(case.flags, world=case.world)
    flags = [*case.flags, "--bpipe", "--bpipe-transport", transport]
    bpipe = megatron.train(flags, world=case.world)
    assert difference(stock, bpipe) is None
    assert evicted(bpipe) > 0
    assert f"transport {transport}" in bpipe.log(0)


def test_bitwise_equal_in_the_evictor_s_own_host_memory(megatron: Megatron) -> None:
    """The host transport: nothing is lent, and the evictor's activations fall all the same."""
    stock = megatron.train(gpt(4))
    hosted = megatron.train([*gpt(4), "--bpipe", "--bpipe-transport", "host"])
    assert difference(stock, hosted) is None
    assert "transport host (one host)" in hosted.log(0)
    before, after = stock.memory["stages"], hosted.memory["stages"]
    assert evicted(hosted) > 0
    assert after[0]["hosted_bytes"] > 0
    assert after[0]["peak_microbatches"] == 3
    assert after[0]["peak_activation_bytes"] < 0.8 * before[0]["peak_activation_bytes"]
    last = after[3]  # keeps what stock 1F1B needs
    assert last["pool_bytes"] == last["pool_slots"] == last["hosted_bytes"] == 0
    assert last["peak_microbatches"] == before[3]["peak_microbatches"] == 1


@pytest.mark.long
def test_what_cannot_leave_trains_all_the_same(megatron: Megatron) -> None:
    """A stage with nothing to evict, hooks of others, sparse tensors, a checkpoint's own leaves."""
    layout = ["--pipeline-model-parallel-layout", "E|t|t|t|t|L"]
    recompute = ["--recompute-granularity", "selective", "--recompute-modules", "layernorm"]
    flags = [*gpt(6, 8, 4), *layout, *recompute]
    hooks = [{"call": "tests.harness.settings:odd_saved_tensors", "with": {}}]
    stock = megatron.train(flags, world=6, steps=3, hooks=hooks)
    bpipe = megatron.train([*flags, "--bpipe"], world=6, steps=3, hooks=hooks)
    assert difference(stock, bpipe) is None
    embedding, first, *_ = bpipe.memory["stages"]
    assert embedding["evicted_bytes"] == 0
    assert first["evicted_bytes"] == first["loaded_bytes"] > 0
    assert first["peak_microbatches"] <= bpipe.memory["budget"]
    forward = first["forward"]
    assert forward["unread_slots"] > 0
    assert forward["kept_bytes"]["not plain bytes"] > 0
    # of the leaves only the stage's own input stays: 64 tokens, 2 sequences, 64 hidden, fp32
    assert forward["kept_bytes"]["stage input"] == 64 * 2 * 64 * 4


def test_keep_local_is_equal_too(megatron: Megatron) -> None:
    stock = megatron.train(gpt(4))
    kept = megatron.train([*gpt(4), "--bpipe", "--bpipe-keep-local"])
    assert difference(stock, kept) is None
    assert evicted(kept) > 0
    # nothing was dropped: stage 0 still peaks at 4
    assert kept.memory["stages"][0]["peak_microbatches"] == 4


def test_one_flipped_bit_is_seen(megatron: Megatron) -> None:
    stock = megatron.train(gpt(4))
    tampered = megatron.train([*gpt(4), "--bpipe"], hooks=[TAMPER])
    assert difference(stock, tampered) is not None


def test_the_loss_falls(megatron: Megatron) -> None:
    states = megatron.train([*gpt(4), "--bpipe"]).states
    losses = [step["lm loss"] for step in states[-1]["losses"]]
    assert losses[0] - losses[-1] > 0.3


@pytest.mark.long
@pytest.mark.parametrize("first", ["stock", "bpipe"])
def test_resume_across_bpipe_on_and_off(megatron: Megatron, tmp_path: Path, first: str) -> None:
    """Five steps with, five without, from a checkpoint: what ten steps of stock give.

    Dropout draws on from where the checkpoint left it.
    """
    flags = COMBINATIONS["dropout"].flags
    extra = {"stock": [], "bpipe": ["--bpipe"]}
    other = "bpipe" if first == "stock" else "stock"
    save = ["--save", str(tmp_path), "--save-interval", "5", "--exit-interval", "5"]
    begun = megatron.train([*flags, *save, *extra[first]], dump_at=5)
    assert begun.ok, begun.logs
    load = ["--load", str(tmp_path)]
    resumed = megatron.train([*flags, *load, *extra[other]], dump_at=5)
    assert resumed.ok, resumed.logs
    whole = megatron.train(flags)
    assert evicted(begun if first == "bpipe" else resumed) > 0
    for one, another in zip(whole.states, resumed.states, strict=True):
        assert one["params"].keys() == another["params"].keys()
        assert all(map(torch.equal, one["params"].values(), another["params"].values()))
        assert all(map(torch.equal, one["grads"].values(), another["grads"].values()))
    losses = [step["lm loss"] for step in whole.states[-1]["losses"]]
    parts = [step["lm loss"] for run in (begun, resumed) for step in run.states[-1]["losses"]]
    assert all(map(torch.equal, losses, parts))
    assert len(parts) == 10


def test_links_are_measured_on_request(megatron: Megatron) -> None:
    result = megatron.train([*gpt(4), "--bpipe", "--bpipe-measure-links"], steps=3)
    assert result.ok, result.logs
    for rank, pair in ((0, "0-3"), (1, "1-2")):
        said = [line for line in result.log(rank).splitlines() if f"bpipe: pair {pair}:" in line]
        evicts = result.memory["stages"][rank]["evicted_bytes"] > 0
        assert any("shm copies" in line and "GiB/s back" in line for line in said) == evicts
    assert "bpipe: pair" not in result.log(3)


def test_a_slow_link_is_foretold_and_warned_of_once(megatron: Megatron) -> None:
    slow = {"call": "tests.harness.settings:every_link_is_slow", "with": {}}
    result = megatron.train([*gpt(4), "--bpipe"], steps=4, hooks=[slow])
    assert result.ok, result.logs
    measured = "ms of an iteration; the link is too slow to hide the copies"
    assert result.log(0).count("bpipe: pair 0-3: evictions were waited for") == 1
    assert result.log(0).count(measured) == 1
    foretold = (
        "bpipe: pair 0-3: expected before training (published bandwidth, A100-80GB at 50% MFU)"
    )
    assert result.log(0).count(foretold) == 1
    assert result.log(0).index(foretold) < result.log(0).index(measured)
    assert "too slow" not in "".join(result.log(rank) for rank in (1, 2, 3))
