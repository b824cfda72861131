"""``plan`` as a user meets it: what it says, and one line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.estimate.models import Model, llama
from megatron_bpipe.estimate.profile import (
    Device,
    HeadRow,
    Profile,
    StageRow,
    Timing,
    write_profile,
)
from megatron_bpipe.planner.output.megatron_flags import model_flags

MODEL = llama("the model", hidden=4096, heads=32, layers=32, seq=2048)
CLUSTER = ["--gpu", "A100-80GB", "--gpus", "16", "--global-batch", "64"]


def timing(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, 5)


def profile(model: Model = MODEL, tp: int = 2) -> Profile:
    """Micro-batches 1 and 2 with flash attention; 4 did not fit."""
    rows = [
        StageRow(b, "flash", timing(0.01 * b), timing(0.02 * b), b * 2**28, 50.0) for b in (1, 2)
    ]
    return Profile(
        model=model,
        tp=tp,
        sequence_parallel=False,
        ep=1,
        element=2,
        layers=8,
        device=Device("NVIDIA A100-SXM4-80GB", 312e12, "datasheet", 80 * 2**30),
        stage=(*rows, StageRow(4, "flash", failure="out of memory")),
        head=tuple(HeadRow(b, timing(0.001 * b), timing(0.002 * b), b * 2**26) for b in (1, 2, 4)),
    )


@pytest.fixture
def profile_file(tmp_path: Path) -> Callable[[Profile], str]:
    def write(content: Profile) -> str:
        write_profile(content, tmp_path / "profile.json")
        return str(tmp_path / "profile.json")

    return write


def test_it_says_what_to_run_and_whether_bpipe_pays(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "LLaMA 65B", "--gpu", "A100-80GB", "--gpus", "32", "--global-batch", "128"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "points of MFU over interleaved" in out  # by interleaved BPipe
    assert "less than what is uncertain (at least" in out
    assert "peak memory by stage" in out
    assert "why the rest fell out" in out
    assert "Outside the re-evaluation's runs" in out
    last = out.splitlines()[-1]
    assert last.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun --nnodes 4")
    assert "-m megatron_bpipe run pretrain_gpt.py --num-layers 80" in last


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "LLaMA 65B", "--json", "--gpu", "B200", "--gpus", "8",
                 "--global-batch", "32", "--even-layers"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    best = found["plans"][0]
    assert len(best["peak_gib"]) == best["layout"]["pp"] == len(best["partition"])
    assert all(need < has for need, has in zip(best["peak_gib"], best["capacity_gib"], strict=True))
    assert found["uncertainty"]["gain"] > 0
    assert "torchrun --n" in found["command"]


def test_a_profile_narrows_the_search_and_sets_the_pace(
    profile_file: Callable[[Profile], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = profile_file(profile())
    words = ["plan", *CLUSTER, "--profile", path, "--json", "--", *model_flags(MODEL), "--bf16"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert {plan["layout"]["tp"] for plan in found["plans"]} == {2}
    assert {plan["micro_batch"] for plan in found["plans"]} <= {1, 2}
    plain = next(plan for plan in found["plans"] if plan["way"] == "1F1B")
    # 32 layers at 30/8 ms and the head's 3 ms a micro-batch and sequence, on d pipelines
    work = 64 / plain["layout"]["dp"] * (32 * 0.030 / 8 + 0.003) / plain["layout"]["pp"]
    assert work < plain["seconds"] < 1.6 * work


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (profile(tp=4), "tp is 4, but --tensor-model-parallel-size is 2"),
        (profile(replace(MODEL, hidden=2048)), "model.hidden is 2048, the model has 4096"),
        (profile(replace(MODEL, vocab=50000)), "model.vocab is 50000"),
        (replace(profile(), element=4), "element is 4 bytes, the model's are 2"),
        (replace(profile(), stage=profile().stage[2:]), "stage has no row that ran"),
    ],
    ids=["t", "hidden", "vocabulary", "fp32", "nothing fitted"],
)
def test_a_profile_of_something_else_is_refused_by_field(
    profile_file: Callable[[Profile], str],
    capsys: pytest.CaptureFixture[str],
    change: Profile,
    named: str,
) -> None:
    path = profile_file(change)
    flags = [*model_flags(MODEL), "--bf16", "--tensor-model-parallel-size", "2"]
    assert main(["plan", *CLUSTER, "--profile", path, "--", *flags]) == 2
    said = capsys.readouterr().err
    assert path in said
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (CLUSTER, "no model"),
        (["--model", "LLaMA 65B"], "--global-batch"),
        (["--model", "BERT", *CLUSTER], "BERT"),
        (["--model", "LLaMA 65B", "--global-batch", "128"], "no cluster"),
        (["--model", "LLaMA 65B", "--global-batch", "0", "--gpu", "H200", "--gpus", "8"], "is 0"),
        (["--model", "LLaMA 65B", "--gpu", "K80", *CLUSTER[2:]], "K80"),
        (["--model", "LLaMA 65B", *CLUSTER, "--cluster", "x.toml"], "--cluster x.toml"),
        (["--model", "LLaMA 65B", *CLUSTER, "--attention", "flahs"], "--attention flahs"),
        (["--model", "LLaMA 65B", *CLUSTER, "--profile", "none.json"], "none.json"),
        (["--model", "LLaMA 65B", *CLUSTER, "--", "--lr", "1"], "--model LLaMA 65B"),
        (["--hf-config", "none.json", *CLUSTER], "none.json"),
        ([*CLUSTER, "--", "--num-layers", "8"], "--hidden-size is missing"),
        ([*CLUSTER, "--", *model_flags(MODEL), "--micro-batch-size", "x"], "--micro-batch-size"),
        (["--model", "LLaMA 65B", *CLUSTER, "--profile", "table-5", "--attention", "full"], "full"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("plan: ")
    assert named in said
    assert said.count("\n") == 1
