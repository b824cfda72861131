"""Schedules that split the backward (F, B, W): bitwise what stock Megatron does in 1F1B.

Stock here is Megatron's own 1F1B with its own messages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_bpipe.estimate.memory.activations import local_kernels
from megatron_bpipe.estimate.memory.weight_gradients import left_for_weight
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.schedule import lower
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.simulate.engine import simulate
from megatron_bpipe.simulate.memory import memory_steps
from megatron_bpipe.simulate.recorded.recording import (
    measured_bytes,
    measured_costs,
    read_report,
)
from tests.harness import Megatron
from tests.harness.compare import difference, difference_across_placements, evicted
from tests.harness.live_bytes import microbatches_held
from tests.harness.models import TAMPER, gpt
from tests.training.combinations import (
    DISTRIBUTED_OPTIMIZER,
    FUSION,
    LLAMA,
    MOE,
    Combination,
    cases,
)

ZB_H1 = ["--bpipe-schedule", "zb-h1"]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
SEQUENCE_PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
FULL = [
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
]


def four(*extra: str, microbatches: int = 8) -> list[str]:
    return gpt(4, microbatches, None, *extra)


COMBINATIONS = {
    "pp4": Combination(4, four(), quick=True),
    "pp8 bf16": Combination(8, gpt(8, 9, None, "--bf16")),
    "m < p": Combination(4, four(microbatches=3)),
    "fusion": Combination(4, four("--bf16"), [FUSION]),
    "untied, dropout": Combination(4, four(*DROPOUT, "--untie-embeddings-and-output-weights")),
    "LLaMA-like, tp2, sequence parallelism, bf16": Combination(
        8, four(*LLAMA, *SEQUENCE_PARALLEL, "--bf16"), quick=True
    ),
    "tp2, sequence parallelism, biases": Combination(8, four(*SEQUENCE_PARALLEL)),
    "tp2, sequence parallelism, fusion": Combination(8, four(*SEQUENCE_PARALLEL), [FUSION]),
    "dp2 distributed optimizer, both overlaps": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, microbatches=16), quick=True
    ),
    "dp2 distributed optimizer, no overlap": Combination(
        8, four("--use-distributed-optimizer", microbatches=16)
    ),
    "dp2 distributed optimizer, not aligned": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, "--no-align-grad-reduce", microbatches=16)
    ),
    "dp2 distributed optimizer, overlaps, fusion": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, microbatches=16), [FUSION]
    ),
    "full recompute with dropout": Combination(4, four(*FULL, *DROPOUT)),
    "selective recompute": Combination(4, four("--recompute-granularity", "selective")),
    "MoE, 4 experts": Combination(4, four(*MOE)),
    "evaluation between steps": Combination(4, four("--eval-iters", "2", "--eval-interval", "3")),
    "uneven layers": Combination(
        4, gpt(4, 8, 8, "--pipeline-model-parallel-layout", "Et|tt|tt|tttL")
    ),
    "per-token loss": Combination(4, four("--calculate-per-token-loss")),
}


@pytest.mark.parametrize("name", cases(COMBINATIONS))
def test_bitwise_1f1b(megatron: Megatron, name: str) -> None:
    case = COMBINATIONS[name]
    stock = megatron.train(case.flags, world=case.world, hooks=case.hooks)
    split = megatron.train([*case.flags, *ZB_H1], world=case.world, hooks=case.hooks)
    assert difference(stock, split) is None
    assert any(event["op"].startswith("W") for event in split.timeline(0)["iterations"][-1])


BALANCED = {
    "pp4": Combination(4, four(), quick=True),
    "pp8": Combination(8, gpt(8, 12)),
    "tp2, sequence parallelism, bf16, fusion": Combination(
        8, four(*SEQUENCE_PARALLEL, "--bf16"), [FUSION]
    ),
    "dp2 distributed optimizer, both overlaps": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, microbatches=16)
    ),
    "full recompute with dropout": Combination(4, four(*FULL, *DROPOUT)),
    "MoE, 4 experts": Combination(4, four(*MOE)),
}


@pytest.mark.parametrize("name", cases(BALANCED))
def test_bpipe_on_zb_h1(megatron: Megatron, name: str) -> None:
    case = BALANCED[name]
    stock = megatron.train(case.flags, world=case.world, hooks=case.hooks)
    bpipe = megatron.train([*case.flags, *ZB_H1, "--bpipe"], world=case.world, hooks=case.hooks)
    assert difference(stock, bpipe) is None
    assert evicted(bpipe) > 0
    for stage in bpipe.memory["stages"]:
        assert stage["evicted_bytes"] == stage["loaded_bytes"]
        assert stage["peak_microbatches"] <= bpipe.memory["budget"]


@pytest.mark.long
def test_one_flipped_bit_is_seen(megatron: Megatron) -> None:
    stock = megatron.train(four())
    tampered = megatron.train([*four(), *ZB_H1, "--bpipe"], hooks=[TAMPER])
    assert difference(stock, tampered) is not None


@pytest.mark.long
def test_a_weight_gradient_left_out_is_seen(megatron: Megatron) -> None:
    """The control: without one W the gradients differ."""
    lost = {"call": "tests.harness.controls:lose_one_weight_gradient", "with": {}}
    stock = megatron.train(four())
    assert difference(stock, megatron.train([*four(), *ZB_H1], hooks=[lost])) is not None


def delayed(delay: bool, lose: bool = False) -> dict[str, Any]:
    how = {"delay": delay, "lose": lose}
    return {"call": "tests.harness.delayed_linear:like_transformer_engine", "with": how}


@pytest.mark.long
@pytest.mark.parametrize("lose", [False, True])
@pytest.mark.parametrize("schedule", ["zb-h1", "v-half"])
def test_transformer_engines_way(megatron: Megatron, schedule: str, lose: bool) -> None:
    """Layers that put their weight gradients off themselves, by a stand-in, under DP 2.

    Where one gradient is lost, it is seen.
    """
    ours = ["--bpipe-schedule", schedule]
    if schedule == "zb-h1":
        flags = gpt(2, 4, None, *DISTRIBUTED_OPTIMIZER)
        stock = megatron.train(flags, steps=3, hooks=[delayed(False)])
        split = megatron.train([*flags, *ours], steps=3, hooks=[delayed(True, lose)])
        found = difference(stock, split)
    else:
        by_name = {"call": "tests.harness.settings:parameters_by_name", "with": {}}
        virtual = ("--num-virtual-stages-per-pipeline-rank", "2", "--clip-grad", "0")
        flags = gpt(2, 8, 4, *virtual, *DISTRIBUTED_OPTIMIZER)
        stock = megatron.train(flags, steps=3, hooks=[delayed(False), by_name])
        hooks = [delayed(True, lose), by_name]
        split = megatron.train([*flags, *ours], steps=3, hooks=hooks)
        found = difference_across_placements(stock, split, 2)
    assert (found is not None) is lose


GPT = Model(
    name="gpt", hidden=64, heads=4, kv_heads=4, layers=4, seq=64, vocab=257, ffn=256, gated=False,
    norm="layernorm", bias=True, tied_embeddings=True, learned_positions=True, dropout=False,
)  # fmt: skip
SMALL_LLAMA = replace(
    GPT, name="llama", kv_heads=2, ffn=128, gated=True, norm="rmsnorm", bias=False,
    tied_embeddings=False, learned_positions=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "layout", "element"),
    [
        ("pp4", GPT, Layout(pp=4), 4),
        (
            *("LLaMA-like, tp2, sequence parallelism, bf16", SMALL_LLAMA),
            *(Layout(pp=4, tp=2, sequence_parallel=True), 2),
        ),
    ],
)
def test_the_memory_model_knows_what_waits_for_w(
    megatron: Megatron, name: str, model: Model, layout: Layout, element: int
) -> None:
    """Exactly, on the stages that have layers alone."""
    case = COMBINATIONS[name]
    stages = megatron.train([*case.flags, *ZB_H1], world=case.world).memory["stages"]
    run = Run(model, layout, 2, 16, "none")
    predicted = left_for_weight(run, 1, head=False, kernels=local_kernels(element))
    assert [stage["left_for_weight_bytes"] for stage in stages[1:3]] == [predicted] * 2


def test_live_storage_is_what_the_paper_states(megatron: Megatron) -> None:
    """No stage more than 1F1B's first, p micro-batches, in bytes (docs/schedules/README.md).

    On the others most wait for W, with 16 of the 18 s b h elements that a layer's forward left.
    """
    stock, split = megatron.train(four()), megatron.train([*four(), *ZB_H1])
    before = [microbatches_held(stock.timeline(stage)) for stage in range(4)]
    held = [microbatches_held(split.timeline(stage)) for stage in range(4)]
    assert before == pytest.approx([4, 3, 2, 1], abs=0.05)
    assert max(held) < 4.05, held
    assert min(held) > 16 / 18 * 4 - 0.05, held


def test_bytes_between_b_and_w(megatron: Megatron) -> None:
    """16 elements of s b h a layer wait for W: by hand 7 of inputs, 9 of gradients, fp32 here.

    The simulation with the recorded sizes foretells every stage's peak.
    """
    per_layer = 16 * 4 * (64 * 2 * 64)
    plain = megatron.train([*four(), *ZB_H1])
    for stage in plain.memory["stages"][1:3]:
        assert stage["left_for_weight_bytes"] == per_layer
    for run, balanced in ((plain, False), (megatron.train([*four(), *ZB_H1, "--bpipe"]), True)):
        recording = read_report(run.out / "report")
        schedule = lower(make(ScheduleSpec("zb-h1", 4, 8, balanced=balanced)))
        simulation = simulate(schedule, measured_costs(recording))
        steps = memory_steps(simulation, measured_bytes(recording))
        for stage, (found, seen) in enumerate(zip(steps, run.memory["stages"], strict=True)):
            assert found.peak == pytest.approx(seen["peak_activation_bytes"], rel=0.05), stage
