"""The search against looking at everything, and the short simulations against long ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G, H100_80G
from megatron_bpipe.estimate.memory.stages import FIXED_OVERHEAD
from megatron_bpipe.estimate.models import llama, model_named
from megatron_bpipe.estimate.paper.refined import bytes_moved
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.time.op_costs import costs_for, network_for
from megatron_bpipe.estimate.time.scheduled import lowered_of
from megatron_bpipe.planner.evaluate import least_seconds, memory_of, place, seconds_of
from megatron_bpipe.planner.inputs.cluster import Cluster, Nodes, preset
from megatron_bpipe.planner.inputs.flags import Fixed
from megatron_bpipe.planner.inputs.sources import from_layer_model
from megatron_bpipe.planner.output.advice import advice
from megatron_bpipe.planner.search import Found, evaluate, search
from megatron_bpipe.planner.space import Question, Refused, shapes
from megatron_bpipe.planner.uncertainty import uncertainty
from megatron_bpipe.planner.ways import way_of, ways
from megatron_bpipe.simulate import simulate

PREDICTOR = from_layer_model(2, FIXED_OVERHEAD)
SMALL = llama("20 B", hidden=6144, heads=48, layers=44, seq=4096, vocab=128000, kv_heads=8)
MIXED = Cluster("mixed", (Nodes(2, 8, A100_80G), Nodes(2, 8, H100_80G)))


def everything(question: Question) -> list[tuple[str, str, float]]:
    """Way, whether it fits, MFU of all candidates, each simulated."""
    refused = Refused()
    return [
        (way_of(c.run), memory.fits, evaluate(c, memory, PREDICTOR).mfu)
        for run in shapes(question, refused)
        for c, memory in ways(question, run, PREDICTOR, refused)
    ]


@pytest.mark.parametrize(
    "question",
    [
        Question(SMALL, preset("A100-80GB", 16), 64, Fixed(tp=2)),
        Question(model_named("GPT-3 96B"), preset("A100-80GB", 32), 128, Fixed(tp=4, pp=8)),
        Question(SMALL, MIXED, 64, Fixed(tp=8)),
    ],
    ids=["20 B", "GPT-3", "two kinds of GPU"],
)
def test_the_best_of_each_way_is_the_best_there_is(question: Question) -> None:
    found = search(question, PREDICTOR)
    known = everything(question)
    assert found.looked_at == len(known)
    for fits in ("yes", "borderline"):
        for way in {way for way, f, _ in known if f == fits}:
            best = max(mfu for w, f, mfu in known if (w, f) == (way, fits))
            plans = [p.mfu for p in found.best if (p.way, p.memory.fits) == (way, fits)]
            assert max(plans) == pytest.approx(best), (way, fits)
    assert sum(large.count for large in found.too_large) == sum(f == "no" for _, f, _ in known)


RUN = Run(model_named("LLaMA 65B"), Layout(tp=4, pp=8, sequence_parallel=True), 2, 512, "flash")
VARIANTS = [
    RUN,
    replace(RUN, partition=(8, 10, 10, 11, 11, 10, 10, 10)),
    replace(RUN, bpipe=True),
    replace(RUN, bpipe=True, budget=6),
    replace(RUN, host=True),
    replace(RUN, chunks=2),
    replace(RUN, chunks=5),
    replace(RUN, chunks=2, bpipe=True, budget=9.5),
    replace(RUN, chunks=5, bpipe=True),
    replace(RUN, schedule="zb-h1"),
    replace(RUN, schedule="zb-h1", bpipe=True, budget=6),
    replace(RUN, schedule="v-half", chunks=2),
    replace(RUN, schedule="v-min", chunks=2, partition=(4, 6, 5, 5, 5, 5, 5, 5, *(5,) * 7, 5)),
    replace(RUN, schedule="v-zb", chunks=2),
    replace(RUN, layout=Layout(tp=4, pp=5, dp=1)),
]


@pytest.mark.parametrize("run", VARIANTS)
def test_a_long_iteration_is_foretold_by_a_short_one(run: Run) -> None:
    cluster = preset("A100-80GB", run.layout.gpus, run.layout.gpus // run.layout.pp)
    candidate = place(run, cluster, PREDICTOR)
    lowered = lowered_of(run)
    costs = costs_for(run, lowered, candidate.machine, PREDICTOR.stored)
    whole = simulate(lowered, costs, network_for(candidate.machine)).seconds
    moved = bytes_moved(run, PREDICTOR.stored.kernels)
    penalty = PREDICTOR.bpipe * moved if run.bpipe else 0.0
    near = 5e-3 if run.host else 2e-3  # a slow link falls behind ever more slowly
    assert seconds_of(candidate, PREDICTOR) == pytest.approx(whole + penalty, rel=near)
    assert least_seconds(candidate) <= whole + penalty


def best(found: Found) -> tuple[int, ...]:
    plan = found.best_of()
    assert plan is not None
    run = plan.candidate.run
    return tuple(run.layers_of(stage) for stage in range(run.layout.pp))


def test_faster_gpus_get_more_layers() -> None:
    """H100s reach 3.0 times what A100s do in large products, 2.5 in a layer; memory allowing."""
    found = search(Question(SMALL, MIXED, 64, Fixed(tp=8, pp=4)), PREDICTOR)
    plan = found.best_of()
    assert plan is not None
    layers = dict.fromkeys(("A100-80GB", "H100-80GB"), 0)
    for gpu, count in zip(plan.candidate.gpus, best(found), strict=True):
        layers[gpu.name] += count
    assert sum(layers.values()) == SMALL.layers
    assert 1.8 < layers["H100-80GB"] / layers["A100-80GB"] < 3.2


def test_a_stage_never_lies_on_two_kinds() -> None:
    refused = Refused()
    question = Question(SMALL, MIXED, 64, Fixed(tp=8, pp=1))
    assert not [
        c for run in shapes(question, refused) for c in ways(question, run, PREDICTOR, refused)
    ]
    assert "two kinds of GPU" in next(iter(refused.reasons()))


def test_a_model_too_large_and_one_that_always_fits() -> None:
    unsure = uncertainty(stages_measured=False)
    too_large = search(Question(model_named("GPT-3 96B"), preset("A100-40GB", 4), 16), PREDICTOR)
    assert too_large.best == ()
    assert "Nothing fits" in advice(too_large, unsure, True)
    tiny = llama("tiny", hidden=1024, heads=16, layers=16, seq=2048)
    fits = search(Question(tiny, preset("H200", 8), 64, attentions=("flash",)), PREDICTOR)
    assert fits.best_of("BPipe") is None
    assert "nothing fits with it" in advice(fits, unsure, True)


def test_nothing_to_look_at_says_why() -> None:
    with pytest.raises(EstimateError, match=r"nothing to plan: .*does not divide the GPUs"):
        search(Question(SMALL, preset("A100-80GB", 16), 64, Fixed(tp=8, pp=5)), PREDICTOR)


def test_memory_of_each_stage_is_for_its_own_gpu() -> None:
    candidate = place(Run(SMALL, Layout(tp=8, pp=4), 1, 64, "flash"), MIXED, PREDICTOR)
    assert [gpu.name for gpu in candidate.gpus] == ["A100-80GB"] * 2 + ["H100-80GB"] * 2
    gpus = (replace(A100_80G, memory_gib=20.0), *candidate.gpus[1:])
    smaller = replace(candidate, machine=replace(candidate.machine, gpus=gpus))
    assert memory_of(smaller, PREDICTOR).tightest == 0
