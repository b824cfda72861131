"""Memory per stage, and what fits on 80 GiB: our inference for table 3."""

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.activations import (
    FUSED,
    MEGATRON_2023,
    TRANSFORMER_ENGINE,
    micro_batch_bytes,
)
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.memory.stages import FP32, GIB, memory_by_stage, peak_gib, verdict
from megatron_bpipe.estimate.models import gpt, model_named
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, LAYOUT
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.settings import Settings


def test_row_7_by_hand():
    """GPT-3 96B, t = 4, p = 8, b = 1: 18 bytes for 12 h^2 x 10 / 4 and the embedding's quarter;
    8 micro-batches of 34 s b h / 4 in 10 layers (and 1/4 s b h dropout) on stage 0."""
    h, s = 9984, 2048
    stage = memory_by_stage(Run(model_named("GPT-3 96B"), LAYOUT, 1, 128, "recompute"))[0]
    parameters = 12 * h * h * 10 / 4 + 51200 * h / 4 + s * h
    assert stage.weights + stage.gradients + stage.optimizer == pytest.approx(
        18 * parameters, rel=1e-3
    )
    assert stage.activations == 8 * (10 * 34 + 1) * s * h // 4
    assert stage.recompute == 5 * 104 * s * s // 4


def test_micro_batches_follow_the_schedule():
    """p = 8: 1F1B holds 8..1; BPipe at most ceil(10/2) = 5, slots in flight counted twice."""
    run = Run(model_named("LLaMA 65B"), LAYOUT, 1, 128, "flash")
    unit = micro_batch_bytes(run, 1)
    stock = memory_by_stage(run)
    assert [stage.activations // unit for stage in stock] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert all(stage.pool == 0 for stage in stock)
    bpipe = memory_by_stage(replace(run, bpipe=True))
    held = [(stage.activations // unit, stage.pool // unit) for stage in bpipe]
    assert max(own + lent for own, lent in held) == 5
    assert held[0] == (5, 0)
    assert held[7][0] == 1
    assert held[7][1] >= 3  # three of the eight are away at least


def test_a_short_iteration_holds_no_more_than_it_has():
    run = Run(model_named("LLaMA 65B"), LAYOUT, 1, 3, "flash")
    unit = micro_batch_bytes(run, 1)
    assert [stage.activations // unit for stage in memory_by_stage(run)] == [3, 3, 3, 3, 3, 3, 2, 1]


def test_logits_are_on_the_last_stage_only():
    """A quarter of 32000 padded to 32256 and two inputs of h/4.  A logit takes 2 bytes and an fp32
    copy; in 2023 a second one, as the maximum was subtracted into a new tensor."""
    run = Run(model_named("LLaMA 65B"), LAYOUT, 2, 128, "flash")
    for kernels, each in ((FUSED, 6), (MEGATRON_2023, 10)):
        stages = memory_by_stage(run, kernels)
        assert [stage.logits for stage in stages[:-1]] == [0] * 7
        assert stages[-1].logits == 2 * 2048 * (each * 32256 // 4 + 2 * 2 * 8192 // 4)


def test_a_fused_loss_works_in_place():
    run = Run(
        model_named("LLaMA 65B"), LAYOUT, 2, 128, "flash", settings=Settings(loss_fusion=True)
    )
    assert memory_by_stage(run)[-1].logits == 2 * 2048 * (4 * 32256 // 4 + 2 * 2 * 8192 // 4)


def test_the_word_embeddings_gradient_is_there_when_one_micro_batch_is_gone():
    """256,000 x 4096 in fp16 is 1.95 GiB, more than the 0.8 of a micro-batch of three layers."""
    model = replace(
        gpt("wide", hidden=4096, heads=32, layers=48, seq=2048, vocab=256_000),
        tied_embeddings=False,
    )
    run = Run(model, Layout(pp=16), 1, 128, "flash")
    first, second = memory_by_stage(run)[:2]
    layers = 3 * 34 * 2048 * 4096
    assert first.embedding == 2 * 256_000 * 4096 - layers
    assert first.working == first.embedding > second.working
    assert first.allocated == first.total - first.overhead


def test_transformer_engine_keeps_one_gradient_of_each_shape():
    """QKV, projection, both matrices of the FFN, in bf16; not without fused accumulation."""
    model = gpt("small", hidden=512, heads=8, layers=4, seq=256)
    run = Run(model, Layout(), 1, 16, "flash")
    with_it, plain = (
        memory_by_stage(run, kernels)[0].gradients
        for kernels in (TRANSFORMER_ENGINE, replace(TRANSFORMER_ENGINE, placeholders=False))
    )
    assert with_it - plain == 2 * (3 + 1 + 4 + 4) * 512 * 512
    apart = replace(run, settings=Settings(grad_fusion=False))
    assert memory_by_stage(apart, TRANSFORMER_ENGINE)[0].gradients == plain


def test_distributed_optimizer_shares_the_12_bytes():
    model = gpt("small", hidden=512, heads=8, layers=4, seq=256)
    run = Run(model, Layout(dp=4), 1, 16, "none")
    alone, shared = (
        memory_by_stage(replace(run, distributed_optimizer=on))[0] for on in (False, True)
    )
    parameters = stage_parameters(run, 0).total
    assert (alone.weights, alone.gradients, alone.optimizer) == (
        2 * parameters,
        4 * parameters,
        12 * parameters,
    )
    assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)
    assert shared.optimizer == 3 * parameters


def test_experts_share_their_optimizer_among_fewer_ranks():
    """dp 4, ep 4: each expert has one owner, so nothing of its optimizer state is shared."""
    dense = gpt("dense", hidden=512, heads=8, layers=4, seq=256)
    run = Run(
        replace(dense, experts=4), Layout(dp=4, ep=4), 1, 16, "none", distributed_optimizer=True
    )
    parameters = stage_parameters(run, 0)
    assert memory_by_stage(run)[0].optimizer == 3 * parameters.dense + 12 * parameters.experts


def test_fp32_state_is_16_bytes():
    run = Run(gpt("small", hidden=512, heads=8, layers=4, seq=256), Layout(), 1, 16, "none")
    stage = memory_by_stage(run, state=FP32)[0]
    parameters = stage_parameters(run, 0).total
    assert stage.weights + stage.gradients + stage.optimizer == 16 * parameters


def test_verdicts_are_cautious_within_5_per_cent():
    assert [verdict(x, 80) for x in (75.9, 76.0, 80.0, 84.0, 84.1)] == [
        "yes",
        "borderline",
        "borderline",
        "borderline",
        "no",
    ]
    with pytest.raises(EstimateError, match="0 GiB"):
        verdict(10, 0)


@pytest.mark.parametrize("overhead_gib", [0, 1, 2, 3, 4, 5])
def test_table_3_fits_as_run_and_needs_bpipe_where_it_is_used(overhead_gib):
    for experiment in EXPERIMENTS:
        as_run = peak_gib(experiment.run(), MEGATRON_2023, overhead=overhead_gib * GIB)
        assert verdict(as_run) == "yes", experiment
        without = peak_gib(experiment.run(bpipe=False), MEGATRON_2023, overhead=overhead_gib * GIB)
        assert (verdict(without) == "yes") is (experiment.id not in (3, 6, 8, 10)), experiment
