"""`plan` under a schedule without a flush: more versions of the weights, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.memory.stages import memory_by_stage
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.settings import DEFAULT
from megatron_bpipe.planner.inputs.flags import read_flags

MODEL = [
    *("--num-layers", "8", "--hidden-size", "512", "--num-attention-heads", "8", "--bf16"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--vocab-size", "1000"),
    *("--global-batch-size", "32", "--pipeline-model-parallel-size", "4"),
]


@pytest.mark.parametrize(
    ("name", "more"),
    [("pipedream-2bw", [1, 1, 1, 1]), ("pipedream", [3, 2, 1, 0]), ("continuous", [3, 2, 1, 0])],
)
def test_versions_of_the_weights_are_counted(name: str, more: list[int]) -> None:
    run = Run(read_flags(MODEL).model, Layout(pp=4), 1, 32, "flash")
    lagging = replace(run, settings=replace(DEFAULT, without_flush=name))
    for stage, (plain, kept) in enumerate(
        zip(memory_by_stage(run), memory_by_stage(lagging), strict=True)
    ):
        assert kept.total - plain.total == 2 * more[stage] * stage_parameters(run, stage).total


def test_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = read_flags([*MODEL, "--bpipe-schedule", "pipedream-2bw"])
    (note,) = asked.notes
    assert "changes the optimisation: weights lag by 1 update on every stage" in note
    assert asked.kept[-2:] == ("--bpipe-schedule", "pipedream-2bw")
    assert read_flags([*MODEL, "--bpipe-schedule", "gpipe"]).notes == ()
    cluster = ["--gpu", "A100-80GB", "--gpus", "8", "--top", "1"]
    assert main(["plan", *cluster, "--", *MODEL, "--bpipe-schedule", "pipedream"]) == 0
    shown = capsys.readouterr().out
    assert "weights lag by p-1-x updates on stage x" in shown
    assert "--use-distributed-optimizer" not in shown  # it would be refused
