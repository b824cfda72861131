"""Interleaved 1F1B under BPipe: bitwise what stock Megatron does, with less on the first stages.

Stock here is Megatron's own interleaved schedule with its own messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import Megatron
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt
from tests.harness.stand_in_gpu import INSTEAD, NEEDS_COMPILER
from tests.training.combinations import (
    DEFERRAL,
    DEFERRED,
    DISTRIBUTED_OPTIMIZER,
    FUSION,
    LLAMA,
    MOE,
    Combination,
    cases,
)

NO_OVERLAP = "--no-overlap-p2p-communication"
FULL = [
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
SEQUENCE_PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


def chunked(stages: int, chunks: int, *extra: str, m: int | None = None) -> list[str]:
    """``stages`` stages of ``chunks`` chunks of one layer."""
    virtual = ["--num-virtual-stages-per-pipeline-rank", str(chunks)]
    return gpt(stages, m or 3 * stages, stages * chunks, *virtual, *extra)


def four(*extra: str, m: int | None = None) -> list[str]:
    return chunked(4, 2, *extra, m=m)


COMBINATIONS = {
    "pp4 v2": Combination(4, four(), quick=True),
    "pp4 v3": Combination(4, chunked(4, 3)),
    "pp8 v2": Combination(8, chunked(8, 2, m=16)),
    "groups of 5, the last of 4": Combination(
        4, four("--microbatch-group-size-per-virtual-pipeline-stage", "5", m=9)
    ),
    "messages not overlapped": Combination(4, four(NO_OVERLAP)),
    "tp2 with sequence parallelism": Combination(8, four(*SEQUENCE_PARALLEL)),
    "dp2 distributed optimizer, both overlaps": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, m=16), quick=True
    ),
    "dp2, gradient reductions not aligned": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, "--no-align-grad-reduce", m=24)
    ),
    "dp2, parameter gathers not aligned": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, "--no-align-param-gather", m=24)
    ),
    "gradients of the output layer deferred": Combination(4, four(*DEFERRED), [FUSION, DEFERRAL]),
    "messages overlapped in warm-up and flush": Combination(
        4, four("--overlap-p2p-communication-warmup-flush")
    ),
    "bf16": Combination(4, four("--bf16")),
    "full recompute": Combination(4, four(*FULL)),
    "selective recompute": Combination(4, four("--recompute-granularity", "selective")),
    "dropout": Combination(4, four(*DROPOUT)),
    "MoE, 4 experts": Combination(4, four(*MOE)),
    "untied embeddings": Combination(4, four("--untie-embeddings-and-output-weights")),
    "LLaMA-like": Combination(4, four(*LLAMA)),
    "evaluation between steps": Combination(4, four("--eval-iters", "4", "--eval-interval", "3")),
    "chunks by layout": Combination(
        4, gpt(4, 12, 8, "--pipeline-model-parallel-layout", "Et|t|t|t|t|t|t|tL")
    ),
    "layers of a virtual stage": Combination(
        4, gpt(4, 12, 8, "--num-layers-per-virtual-pipeline-stage", "1")
    ),
}


@pytest.mark.parametrize("name", cases(COMBINATIONS))
def test_bitwise_equal(megatron: Megatron, name: str) -> None:
    case = COMBINATIONS[name]
    stock = megatron.train(case.flags, world=case.world, hooks=case.hooks)
    bpipe = megatron.train([*case.flags, "--bpipe"], world=case.world, hooks=case.hooks)
    check(stock, bpipe)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["p2p", "host"])
@pytest.mark.parametrize("name", ["pp4 v2", "tp2 with sequence parallelism"])
def test_bitwise_equal_over(megatron: Megatron, name: str, transport: str) -> None:
    case = COMBINATIONS[name]
    stock = megatron.train(case.flags, world=case.world)
    flags = [*case.flags, "--bpipe", "--bpipe-transport", transport]
    check(stock, megatron.train(flags, world=case.world))


@pytest.mark.long
@NEEDS_COMPILER
@pytest.mark.parametrize(("transport", "replaced"), [("ipc", "shm"), ("nccl", "p2p")])
def test_bitwise_equal_on_the_stand_in_gpu(
    megatron: Megatron, transport: str, replaced: str
) -> None:
    hook = {"call": INSTEAD, "with": {"transport": transport}}
    bpipe = megatron.train([*four(), "--bpipe", "--bpipe-transport", replaced], hooks=[hook])
    check(megatron.train(four()), bpipe)


def check(stock: Any, bpipe: Any) -> None:
    """Equal, something left, and nothing above the bound."""
    assert difference(stock, bpipe) is None
    assert evicted(stock) == 0
    assert evicted(bpipe) > 0
    for stage in bpipe.memory["stages"]:
        assert stage["evicted_bytes"] == stage["loaded_bytes"]
        assert stage["peak_microbatches"] <= bpipe.memory["budget"]


def test_stage_0_falls_from_11_chunks_to_9(megatron: Megatron) -> None:
    """Measured on live storage, in micro-batches of a whole stage: 5.5 and 4.5."""
    stock = megatron.train(four()).memory["stages"]
    bpipe = megatron.train([*four(), "--bpipe"]).memory
    assert bpipe["budget"] == 4.5
    assert [stage["peak_microbatches"] for stage in stock] == [5.5, 4.5, 3.5, 2.5]
    after = [stage["peak_microbatches"] for stage in bpipe["stages"]]
    assert after[0] == 4.5
    assert max(after) == 4.5
    before, now = stock[0]["peak_activation_bytes"], bpipe["stages"][0]["peak_activation_bytes"]
    assert now < 0.9 * before
    fall = stock[0]["allocator_peak_bytes"] - bpipe["stages"][0]["allocator_peak_bytes"]
    assert fall > 0.7 * (before - now)  # the allocator agrees


@pytest.mark.long
def test_pp8_falls_from_23_chunks_to_17(megatron: Megatron) -> None:
    flags = chunked(8, 2, m=16)
    stock = megatron.train(flags, world=8).memory["stages"]
    bpipe = megatron.train([*flags, "--bpipe"], world=8).memory
    assert bpipe["budget"] == 8.5
    assert stock[0]["peak_microbatches"] == 11.5
    assert max(stage["peak_microbatches"] for stage in bpipe["stages"]) == 8.5


@pytest.mark.long
def test_one_flipped_bit_is_seen(megatron: Megatron) -> None:
    stock = megatron.train(four())
    tampered = megatron.train([*four(), "--bpipe"], hooks=[TAMPER])
    assert difference(stock, tampered) is not None


@pytest.mark.long
@pytest.mark.parametrize(("stages", "chunks"), [(2, 4), (4, 2)])
def test_nothing_to_balance(megatron: Megatron, stages: int, chunks: int) -> None:
    """Two stages are as full as each other; with m = p the inner pair bounds the outer one."""
    flags = chunked(stages, chunks, m=4)
    stock = megatron.train(flags, world=stages, steps=3)
    bpipe = megatron.train([*flags, "--bpipe"], world=stages, steps=3)
    assert difference(stock, bpipe) is None
    said = f"nothing to balance: p = {stages} and interleaved 1F1B of {chunks} chunks"
    assert said in bpipe.log(0)
    ours = megatron.train([*flags, "--bpipe-schedule", "interleaved"], world=stages, steps=3)
    assert difference(stock, ours) is None


@pytest.mark.long
@pytest.mark.parametrize("first", ["stock", "bpipe"])
def test_resume_across_on_and_off(megatron: Megatron, tmp_path: Path, first: str) -> None:
    extra = {"stock": [], "bpipe": ["--bpipe"]}
    other = "bpipe" if first == "stock" else "stock"
    save = ["--save", str(tmp_path), "--save-interval", "5", "--exit-interval", "5"]
    begun = megatron.train([*four(), *save, *extra[first]], dump_at=5)
    assert begun.ok, begun.logs
    resumed = megatron.train([*four(), "--load", str(tmp_path), *extra[other]], dump_at=5)
    assert resumed.ok, resumed.logs
    whole = megatron.train(four())
    for one, another in zip(whole.states, resumed.states, strict=True):
        assert one["params"].keys() == another["params"].keys()
        assert all(map(torch.equal, one["params"].values(), another["params"].values()))


GPIPE = gpt(4, 6)


def test_gpipe_first_in_first_out_is_bitwise_1f1b(megatron: Megatron) -> None:
    """The same sums in the same order; it needs no --bpipe, and holds all m micro-batches."""
    stock = megatron.train(GPIPE)
    gpipe = megatron.train([*GPIPE, "--bpipe-schedule", "gpipe"])
    assert difference(stock, gpipe) is None
    assert [stage["peak_microbatches"] for stage in gpipe.memory["stages"]] == [6] * 4


@pytest.mark.long
def test_gpipe_last_in_first_out_is_equal_but_for_rounding(megatron: Megatron) -> None:
    stock = megatron.train(GPIPE)
    lifo = megatron.train([*GPIPE, "--bpipe-schedule", "gpipe-lifo"])
    assert stock.ok
    assert lifo.ok, lifo.logs
    for one, other in zip(stock.states[-1]["losses"], lifo.states[-1]["losses"], strict=True):
        assert torch.allclose(one["lm loss"], other["lm loss"], rtol=1e-5)
