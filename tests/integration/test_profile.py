"""``profile`` on Megatron's real layers: bytes, times, shares of a rank, and what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.activations import layer_activations, local_kernels
from megatron_bpipe.estimate.profile import (
    HeadRow,
    Profile,
    StageRow,
    check_model,
    read_profile,
)
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.planner.inputs.flags import read_flags
from tests.harness import ROOT, Megatron
from tests.training.measured.test_memory_model import BLOCK, GROUPED, GROUPED_FLAGS, LLAMA_FLAGS

KINDS = ("none", "recompute", "flash", "full")
NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]


def flags(hidden: int, *extra: str) -> list[str]:
    """Four layers on two stages; the training's own flags are there to be ignored."""
    return [
        *("--num-layers", "4", "--pipeline-model-parallel-size", "2", "--bpipe"),
        *("--hidden-size", str(hidden), "--num-attention-heads", "4"),
        *("--seq-length", "64", "--max-position-embeddings", "64", "--vocab-size", "257"),
        *("--micro-batch-size", "2", "--global-batch-size", "16", "--lr", "1e-3"),
        *extra,
    ]


def case(*words: str, hidden: int = 128, **settings: Any) -> dict[str, Any]:
    chosen = {"micro_batches": [1, 4], "attention": KINDS} | settings
    return {"flags": flags(hidden, *words), "settings": chosen}


TP2 = ["--tensor-model-parallel-size", "2"]
EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "192"]
WIDE = ["--kv-channels", "48", "--max-position-embeddings", "96"]
CASES = {
    "gpt": case(*NO_DROPOUT),
    "grouped": case(*NO_DROPOUT, *GROUPED_FLAGS, hidden=256),
    "t2": case(*NO_DROPOUT, *TP2),
    "t2 sequence parallel": case(*NO_DROPOUT, *TP2, "--sequence-parallel"),
    "bf16": case(*NO_DROPOUT, *GROUPED_FLAGS, "--bf16", hidden=256),
    "experts": case(*NO_DROPOUT, *LLAMA_FLAGS, *EXPERTS, attention=["none", "flash"]),
    "dropout": case(attention=["none", "flash"], micro_batches=[1, 2]),
    "wide heads": case(*NO_DROPOUT, *WIDE, attention=["none", "flash"]),
    "too large": case(
        *NO_DROPOUT, attention=["none", "flash"], micro_batches=[1, 512, 1024],
        memory_limit=200 * 2**20, layers=1, repeats=1,
    ),
}  # fmt: skip
MODELS = {
    "gpt": BLOCK,
    "grouped": GROUPED,
    "t2": BLOCK,
    "t2 sequence parallel": BLOCK,
    "bf16": GROUPED,
    "experts": replace(
        BLOCK, ffn=320, expert_ffn=192, gated=True, norm="rmsnorm", bias=False,
        tied_embeddings=False, learned_positions=False, experts=4, experts_per_token=2,
    ),
    "dropout": replace(BLOCK, dropout=True),
    "wide heads": replace(BLOCK, head_dim=48, positions=96),
}  # fmt: skip

# name -> (flags, what the one message must name)
REFUSED = {
    "no layers": (["--hidden-size", "64"], ["--num-layers is missing"]),
    "unknown flag": (flags(128, "--gourmet"), ["unrecognized arguments: --gourmet"]),
    "heads": (
        flags(128, "--tensor-model-parallel-size", "3"),
        ["--num-attention-heads 4", "--tensor-model-parallel-size 3"],
    ),
    "stages": (
        flags(128, "--num-layers", "5"),
        ["--num-layers 5", "--pipeline-model-parallel-size 2"],
    ),
    "query groups": (
        flags(128, "--group-query-attention", "--num-query-groups", "2", *TP2[:1], "4"),
        ["--num-query-groups 2", "--tensor-model-parallel-size 4"],
    ),
    "latent attention": (flags(128, "--multi-latent-attention"), ["--multi-latent-attention"]),
    "dense layers between": (
        flags(128, *EXPERTS, "--moe-layer-freq", "2"),
        ["--moe-layer-freq 2", "profile with 1"],
    ),
    "shared expert": (
        flags(128, *EXPERTS, "--moe-shared-expert-intermediate-size", "64"),
        ["--moe-shared-expert-intermediate-size 64"],
    ),
    "few experts": (
        flags(128, *EXPERTS, "--expert-model-parallel-size", "4"),
        ["--expert-model-parallel-size 4", "--moe-router-topk 2"],
    ),
    "vocabulary": (flags(128)[:-8], ["--vocab-size is missing"]),
    "Transformer Engine": (
        flags(128, "--transformer-impl", "transformer_engine"),
        ["--transformer-impl", "--transformer-impl local"],
    ),
    "Megatron's own checks": (
        flags(128, "--max-position-embeddings", "32"),
        ["Megatron refuses", "max_position_embeddings (32)"],
    ),
}


@pytest.fixture(scope="module")
def measured(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a profile of every case, and answers.json."""
    folder = tmp_path_factory.mktemp("profiles")
    refused = {name: words for name, (words, _) in REFUSED.items()}
    arguments = [json.dumps(CASES), json.dumps(refused), json.dumps(flags(64)), str(folder)]
    result = megatron.script("profile_stage.py", arguments, world=1, timeout=120)
    assert result.ok, result.logs
    return folder


def profile(measured: Path, name: str) -> Profile:
    return read_profile(measured / f"{name}.json")


def test_every_kind_was_measured_at_every_size(measured: Path) -> None:
    found = profile(measured, "gpt")
    wanted = [(b, kind) for kind in KINDS for b in (1, 4)]
    assert [(row.micro_batch, row.attention) for row in found.stage] == wanted
    assert [row.micro_batch for row in found.head] == [1, 4]
    assert (found.tp, found.element, found.layers) == (1, 4, 2)
    for row in (*found.stage, *found.head):
        assert row.failure is None
        for timing in (row.forward, row.backward):
            assert timing is not None
            assert timing.repeats == 3
            assert 0 < timing.low <= timing.median <= timing.high


@pytest.mark.parametrize("name", list(MODELS))
def test_the_model_is_the_one_of_the_flags(measured: Path, name: str) -> None:
    expected = replace(MODELS[name], layers=4, name=profile(measured, name).model.name)
    assert profile(measured, name).model == expected


@pytest.mark.parametrize("name", list(MODELS))
def test_plan_takes_the_profile_for_the_same_flags(measured: Path, name: str) -> None:
    planned = read_flags(CASES[name]["flags"]).model
    check_model(profile(measured, name), planned)
    with pytest.raises(EstimateError, match=r"model\.heads is 4, the model has 2"):
        check_model(profile(measured, name), replace(planned, heads=2, kv_heads=2))


@pytest.mark.parametrize("name", list(MODELS))
def test_bytes_within_5_per_cent_of_the_formula(measured: Path, name: str) -> None:
    found = profile(measured, name)
    # Megatron's default; local_kernels(2) has it as with --attention-softmax-in-fp32
    kernels = replace(local_kernels(found.element), composed=True, fp32_softmax=False)
    layout = Layout(tp=found.tp, sequence_parallel="sequence" in name)
    rows = [row for row in found.stage if row.failure is None]
    assert {row.attention for row in rows} >= ({"none"} if name == "dropout" else {"none", "flash"})
    for row in rows:
        run = Run(found.model, layout, row.micro_batch, row.micro_batch, row.attention)
        formula = found.layers * sum(layer_activations(run, kernels).values())
        assert row.moved == pytest.approx(formula, rel=0.05), row


def test_mfu_is_equation_1_over_time_and_peak(measured: Path) -> None:
    for name, share in (("gpt", 1), ("t2", 2)):
        found = profile(measured, name)
        for row in found.stage:
            assert row.forward is not None
            assert row.backward is not None
            layers, hidden, seq = 2, 128, 64
            flops = 72 * row.micro_batch * seq * layers * hidden**2 * (1 + seq / (6 * hidden))
            seconds = row.forward.median + row.backward.median
            assert row.mfu == pytest.approx(100 * flops / share / (seconds * 1e11))


def test_four_sequences_take_longer_than_one(measured: Path) -> None:
    wide = profile(measured, "grouped")

    def seconds(found: Profile, micro_batch: int) -> float:
        row = found.stage_row(micro_batch, "none")
        assert row is not None
        assert row.forward is not None
        assert row.backward is not None
        return row.forward.low + row.backward.low

    assert seconds(wide, 4) > 1.5 * seconds(wide, 1)


def test_the_output_layer_is_cut_by_tensor_parallelism(measured: Path) -> None:
    """It keeps the norm's input, its own, and the softmax over the rank's part of 257 words."""
    padded = {1: 384, 2: 512}  # multiples of 128 t
    for name in ("gpt", "t2"):
        found = profile(measured, name)
        for row in found.head:
            tokens = 64 * row.micro_batch
            expected = 4 * tokens * (2 * 128 + padded[found.tp] // found.tp)
            assert row.moved == pytest.approx(expected, rel=0.05)


def test_too_large_is_a_result_and_the_rest_is_measured(measured: Path) -> None:
    found = profile(measured, "too large")
    for kind in ("none", "flash"):
        rows: list[StageRow | HeadRow] = [r for r in found.stage if r.attention == kind]
        assert rows[0].failure is None, rows[0]
        assert rows[1].failure is not None
        assert rows[1].failure.startswith("out of memory: ")
        assert rows[2].failure == "not tried: out of memory at 512"
        assert (rows[1].moved, rows[1].forward, rows[2].moved) == (None, None, None)
    assert found.head[0].failure is None
    assert found.device.memory_bytes == 200 * 2**20


def test_a_missing_flash_kernel_is_a_result(measured: Path) -> None:
    first, second = [r for r in profile(measured, "dropout").stage if r.attention == "flash"]
    assert first.failure is not None
    assert "attention dropout 0.1" in first.failure
    assert "--attention-dropout 0" in first.failure
    assert second.failure == "not tried: no flash kernel at 1"


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_profiled_is_refused_by_name(measured: Path, name: str) -> None:
    said = json.loads((measured / "answers.json").read_text())["refused"][name]
    assert "\n" not in said
    for part in REFUSED[name][1]:
        assert part in said


def test_sdpa_computes_what_megatrons_own_attention_does(measured: Path) -> None:
    answers = json.loads((measured / "answers.json").read_text())["attention"]
    assert len(answers) == 3
    for name, found in answers.items():
        for apart, largest in zip(found["apart"], found["largest"], strict=True):
            assert largest > 0.1, name
            assert apart < 2e-6 * max(1, largest), name


def test_the_command(tmp_path: Path) -> None:
    """As a user runs it: the file, the same on stdout, progress beside it."""
    path = tmp_path / "profile.json"
    command = [sys.executable, "-m", "megatron_bpipe", "profile", "--output", str(path), "--json"]
    command += ["--micro-batches", "2", "--attention", "flash", "--repeats", "2", "--layers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--", *flags(64, *NO_DROPOUT)], capture_output=True, text=True, cwd=tmp_path,
        env=environment, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(path.read_text())
    found = read_profile(path)
    assert found.layers == 1
    assert [(row.micro_batch, row.attention) for row in found.stage] == [(2, "flash")]
    assert found.device.peak_flops > 1e8
    assert found.device.peak_source.startswith("measured")
    assert "--micro-batches 2" in found.made_by["command"]
    assert "scaled_dot_product_attention" in found.made_by["flash"]
    assert "[1/2] flash, micro-batch 2: forward" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
