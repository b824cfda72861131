"""Megatron's flags, read and written (that Megatron takes them: tests/integration)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import TABLE_2, Model, llama
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.planner.inputs.flags import (
    Fixed,
    layout_text,
    model_flags,
    plan_flags,
    read_flags,
)

GROUPED = llama("g", hidden=1024, heads=16, layers=8, seq=512, kv_heads=4)
EXPERTS = replace(GROUPED, experts=8, experts_per_token=2)


@pytest.mark.parametrize("model", [*TABLE_2.values(), GROUPED, EXPERTS])
def test_a_model_survives_its_flags(model: Model) -> None:
    assert replace(read_flags(model_flags(model)).model, name=model.name) == model


def test_defaults_are_megatrons() -> None:
    flags = [
        "--num-layers",
        "8",
        "--hidden-size",
        "512",
        "--num-attention-heads",
        "8",
        "--seq-length",
        "64",
    ]
    model = read_flags([*flags, "--vocab-size", "1000"]).model
    assert (model.ffn, model.dropout, model.norm, model.kv_heads) == (2048, True, "layernorm", 8)
    gated = read_flags([*flags, "--vocab-size", "1000", "--swiglu"]).model
    assert gated.ffn == 1344  # 4/3 x 512 x 2 = 1365.3, down to a multiple of 64


def test_what_is_given_is_fixed_and_the_rest_is_kept() -> None:
    words = [
        *model_flags(GROUPED),
        *["--lr", "1e-4", "--bf16", "--tensor-model-parallel-size", "4", "--micro-batch-size", "2"],
        *[
            "--recompute-granularity",
            "selective",
            "--global-batch-size",
            "64",
            "--data-path",
            "a",
            "b",
        ],
    ]
    asked = read_flags(words)
    assert asked.fixed == Fixed(tp=4, micro_batch=2, attention="recompute")
    assert (asked.global_batch, asked.element) == (64, 2)
    kept = " ".join(asked.kept)
    assert "--lr 1e-4" in kept
    assert "--data-path a b" in kept
    assert "--num-layers 8" in kept
    assert "parallel" not in kept
    assert "--global-batch-size" not in kept


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--num-layers", "8"], "--hidden-size is missing"),
        (["--num-layers", "x"], "--num-layers"),
        (["--multi-latent-attention"], "--multi-latent-attention"),
        (["--kv-channels", "256"], "--kv-channels"),
    ],
)
def test_bad_flags_are_named(words: list[str], named: str) -> None:
    with pytest.raises(EstimateError, match=named):
        read_flags(words)


def test_a_plan_as_flags() -> None:
    run = Run(GROUPED, Layout(tp=2, pp=4, dp=2, sequence_parallel=True), 1, 64, "flash")
    plain = plan_flags(run)
    assert "--sequence-parallel" in plain
    assert "--bpipe" not in plain
    assert "--bpipe" in plan_flags(replace(run, bpipe=True))
    budget = plan_flags(replace(run, bpipe=True, budget=4))
    assert budget[budget.index("--bpipe-budget") + 1] == "4"
    uneven = plan_flags(replace(run, partition=(1, 2, 2, 3)))
    assert uneven[uneven.index("--pipeline-model-parallel-layout") + 1] == "Et*1|t*2|t*2|t*3L"
    chunks = plan_flags(replace(run, chunks=2))
    assert chunks[chunks.index("--num-layers-per-virtual-pipeline-stage") + 1] == "1"
    assert layout_text((5,)) == "Et*5L"
