"""`plan` under a schedule without a flush: more versions of the weights, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.activations import FUSED, micro_batch_bytes
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.memory.stages import memory_by_stage
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.planner.inputs.flags import read_flags

MODEL = [
    *("--num-layers", "8", "--hidden-size", "512", "--num-attention-heads", "8", "--bf16"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--vocab-size", "1000"),
    *("--global-batch-size", "32", "--pipeline-model-parallel-size", "4"),
]


@pytest.mark.parametrize(
    ("name", "batch", "more", "held"),
    [
        ("pipedream-2bw", 32, [1, 1, 1, 1], [4, 3, 2, 1]),
        ("pipedream", 1, [3, 2, 1, 0], [4, 3, 2, 1]),
        ("continuous", 2, [3, 2, 1, 0], [8, 6, 4, 2]),
    ],
)
def test_versions_of_the_weights_are_counted(
    name: str, batch: int, more: list[int], held: list[int]
) -> None:
    """And activations as in 1F1B, ContinuousPipe's of whole mini-batches (of 2 here)."""
    run = Run(read_flags(MODEL).model, Layout(pp=4), 1, batch, "flash")
    lagging = replace(run, schedule=name)
    for stage, (plain, kept) in enumerate(
        zip(memory_by_stage(run), memory_by_stage(lagging), strict=True)
    ):
        parameters = stage_parameters(run, stage).total
        assert kept.weights - plain.weights == 2 * more[stage] * parameters
        assert (kept.gradients, kept.optimizer) == (plain.gradients, plain.optimizer)
        assert kept.activations == held[stage] * micro_batch_bytes(run, stage, FUSED)


def test_a_schedule_that_needs_other_sizes_is_refused() -> None:
    run = Run(read_flags(MODEL).model, Layout(pp=4), 1, 2, "flash")
    for name, why in (("pipedream", "m is 2"), ("pipedream-2bw", "p-1 = 3 or more")):
        with pytest.raises(EstimateError, match=why):
            memory_by_stage(replace(run, schedule=name))


def test_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = read_flags([*MODEL, "--bpipe-schedule", "pipedream-2bw"])
    (note,) = asked.notes
    assert "changes the optimisation: weights lag by 1 update on every stage" in note
    assert asked.fixed.schedule == "pipedream-2bw"
    assert read_flags([*MODEL, "--bpipe-schedule", "gpipe"]).notes == ()
    cluster = ["--gpu", "A100-80GB", "--gpus", "8", "--top", "1", "--attention", "flash"]
    words = ["plan", *cluster, "--", *MODEL, "--tensor-model-parallel-size", "1"]
    assert main([*words, "--bpipe-schedule", "pipedream-2bw"]) == 0
    shown = capsys.readouterr().out
    assert "weights lag by 1 update on every stage" in shown
    command = shown.splitlines()[-1]
    assert "--bpipe-schedule pipedream-2bw --rerun-mode disabled" in command
    assert "--use-distributed-optimizer" not in command  # it would be refused
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "PipeDream" not in shown  # which changes the optimisation: only where asked for
    # a batch of 32 on 2 pipelines is not one micro-batch: nothing to plan
    assert main([*words, "--bpipe-schedule", "pipedream", "--micro-batch-size", "1"]) == 2
    assert "--bpipe-schedule pipedream" in capsys.readouterr().err
