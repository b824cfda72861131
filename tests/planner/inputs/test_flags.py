"""Megatron's flags, read and written (that Megatron takes them: tests/integration)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.estimate.memory.stages import BF16, FIXED_OVERHEAD, FP16, FP32, StateBytes
from megatron_bpipe.estimate.models import TABLE_2, Model, llama
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.settings import Recompute, Settings
from megatron_bpipe.planner.evaluate import place
from megatron_bpipe.planner.inputs.cluster import preset
from megatron_bpipe.planner.inputs.flags import read_flags
from megatron_bpipe.planner.inputs.given_layers import layout_layers
from megatron_bpipe.planner.inputs.sources import from_layer_model
from megatron_bpipe.planner.output.megatron_flags import layout_text, model_flags, plan_flags
from megatron_bpipe.planner.space import Question, Refused, shapes

SMALL = [
    *("--num-layers", "8", "--hidden-size", "512", "--num-attention-heads", "8"),
    *("--seq-length", "64", "--vocab-size", "1000"),
]
LAST = ["--decoder-last-pipeline-num-layers", "2"]
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
    fixed = asked.fixed
    assert (fixed.tp, fixed.pp, fixed.micro_batch) == (4, None, 2)
    assert (fixed.attention, fixed.recompute) == ("recompute", Recompute(modules=("core_attn",)))
    assert fixed.attention_words == ("--recompute-granularity", "selective")
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
        (["--hybrid-layer-pattern=M*M-"], "--hybrid-layer-pattern: .* not known"),
        ([*SMALL, "--heterogeneous-layers-config-path", "x"], "--heterogeneous-layers"),
        ([*SMALL, "--moe-layer-freq=[0]*3", "--num-experts", "4"], "3 entries for 8 layers"),
        (SMALL[:-2], "add --vocab-size N of your tokenizer"),
        ([*SMALL, "--recompute-granularity", "full"], "needs --recompute-method"),
        ([*SMALL, "--recompute-modules", "mlp"], "needs --recompute-granularity"),
        (
            [*SMALL, "--recompute-granularity", "selective", "--recompute-modules", "gdn"],
            "--recompute-modules gdn: the planner knows",
        ),
        (
            [*SMALL, "--pipeline-model-parallel-layout=Et*4|t*4L", *LAST],
            "takes it alone, not beside --decoder-last",
        ),
        ([*SMALL, "--pipeline-model-parallel-layout=t*4|t*4L"], "the first with E"),
        (
            [*SMALL, "--step-batch-size-schedule", "0:64", "--global-batch-size", "64"],
            "--global-batch-size 64: Megatron refuses it",
        ),
        ([*SMALL, "--bpipe", "--bpipe-budget", "many"], "--bpipe-budget many"),
        ([*SMALL, "--bpipe-placement", "close"], "--bpipe-placement close: use pair-adjacent"),
        (
            [
                *SMALL,
                "--num-experts=4",
                "--bpipe-placement=pair-adjacent",
                "--tensor-model-parallel-size=2",
                "--expert-tensor-parallel-size=1",
            ],
            "does not go with --expert-tensor-parallel-size 1",
        ),
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


def test_pairs_are_brought_together_only_where_placement_knows_the_experts() -> None:
    """Else Megatron's order is asked for, on which the time is predicted too."""
    words = [*model_flags(EXPERTS), "--bf16", "--bpipe", "--tensor-model-parallel-size", "2"]
    words += ["--pipeline-model-parallel-size", "4", "--micro-batch-size", "1"]
    cluster = preset("A100-80GB", 16, 4)
    links, placements = {}, {}
    for name, more in {
        "left open": [],
        "cut alike": ["--expert-tensor-parallel-size", "2"],
        "asked for": ["--bpipe-placement", "pair-adjacent"],
        "Megatron's": ["--bpipe-placement", "megatron", "--expert-tensor-parallel-size", "2"],
    }.items():
        asked = read_flags([*words, *more])
        question = Question(asked.model, cluster, 32, asked.fixed, attentions=("flash",))
        (shape,) = shapes(question, Refused())
        run = replace(shape, bpipe=True)
        predictor = from_layer_model(2, FIXED_OVERHEAD)
        links[name] = place(run, cluster, predictor).machine.pair
        flags = [*asked.kept, *plan_flags(run, asked.fixed, asked.kept)]
        at = flags.index("--bpipe-placement") if "--bpipe-placement" in flags else None
        placements[name] = None if at is None else flags[at + 1]
    assert placements == {
        "left open": "megatron",
        "cut alike": None,
        "asked for": "pair-adjacent",
        "Megatron's": "megatron",
    }
    near, far = A100_80G.nvlink, A100_80G.network
    assert links == {"left open": far, "cut alike": near, "asked for": near, "Megatron's": far}


def test_what_the_flags_fix_goes_into_the_command_as_it_was_given() -> None:
    words = [
        *SMALL, *("--bf16", "--attention-backend", "flash"),
        *("--recompute-granularity", "selective", "--recompute-modules", "layernorm", "mlp"),
        *("--decoder-first-pipeline-num-layers", "1", "--pipeline-model-parallel-size", "4"),
        *("--decoder-last-pipeline-num-layers", "1"),
    ]  # fmt: skip
    asked = read_flags(words)
    assert asked.fixed.attention == "flash"
    assert asked.fixed.recompute == Recompute(modules=("layernorm", "mlp"))
    assert asked.fixed.layers.on(4, 8) == (1, (1, 3, 3, 1))
    run = Run(asked.model, Layout(pp=4), 1, 8, "flash", partition=(1, 3, 3, 1))
    text = " ".join(plan_flags(run, asked.fixed, asked.kept))
    assert "--attention-backend flash --recompute-granularity selective" in text
    assert "--recompute-modules layernorm mlp" in text
    assert "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 1" in text
    assert "layout" not in text


@pytest.mark.parametrize(
    ("words", "p", "expected"),
    [
        (["--num-layers-per-virtual-pipeline-stage", "2"], 2, (2, ())),
        (["--num-virtual-stages-per-pipeline-rank", "4"], 2, (4, ())),
        (["--pipeline-model-parallel-layout", "Et*2|(t|)*4t*2L"], 2, (3, (2, 1, 1, 1, 1, 2))),
        (["--account-for-embedding-in-pipeline-split"], 3, (1, (2, 3, 3))),
        (LAST, 4, (1, (2, 2, 2, 2))),
    ],
)
def test_layers_of_stages_as_flags_fix_them(
    words: list[str], p: int, expected: tuple[int, tuple[int, ...]]
) -> None:
    assert read_flags([*SMALL, *words]).fixed.layers.on(p, 8) == expected


def test_a_layout_is_read_as_megatron_reads_it() -> None:
    assert layout_layers("Ettt|(tt|)*29,m|L".replace("m|L", "|L")) == (3, *[2] * 29, 0, 0)
    assert layout_layers("Et*2|(tt|)*5t|tmL") == (2, *[2] * 5, 1, 1)
    with pytest.raises(EstimateError, match="on the last stage only"):
        layout_layers("Et*4|m|t*4L")


def test_values_joined_with_an_equals_sign_count() -> None:
    model = read_flags([*SMALL, "--kv-channels=128", "--num-experts=4", "--moe-layer-freq=2"]).model
    assert (model.head_width, model.q_width) == (128, 1024)
    assert model.moe_layers == "10101010"
    listed = read_flags([*SMALL, "--num-experts", "4", "--moe-layer-freq", "([0]*1+[1]*7)"]).model
    assert listed.moe_layers == "01111111"


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ([], FP32),
        (["--bf16"], BF16),
        (["--fp16"], FP16),
        (["--fp16", "--accumulate-allreduce-grads-in-fp32"], BF16),
        (["--bf16", "--grad-reduce-in-bf16"], StateBytes(2, 2, 12)),
        (
            [
                *("--bf16", "--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16"),
                *("--exp-avg-sq-dtype", "bf16", "--main-grads-dtype", "bf16"),
            ],
            StateBytes(2, 2, 8),
        ),
    ],
)
def test_bytes_a_parameter_follow_the_precision(words: list[str], state: StateBytes) -> None:
    assert read_flags([*SMALL, *words]).state == state


def test_what_is_not_modelled_is_said() -> None:
    asked = read_flags([*SMALL, "--fp8-format", "hybrid", "--use-megatron-fsdp"])
    assert [note.split(" (")[0] for note in asked.notes] == [
        "not modelled: --fp8-format",
        "not modelled: --use-megatron-fsdp",
    ]
    assert read_flags([*SMALL, "--deterministic-mode"]).fixed.settings == Settings(
        deterministic=True
    )


def test_a_schedule_of_batches_takes_the_place_of_the_batch() -> None:
    asked = read_flags([*SMALL, "--step-batch-size-schedule", "0:384 200B:768"])
    assert (asked.global_batch, asked.own_batch) == (384, True)
    run = Run(asked.model, Layout(), 1, 384, "flash")
    assert "--global-batch-size" not in plan_flags(run, asked.fixed, asked.kept, own_batch=True)
