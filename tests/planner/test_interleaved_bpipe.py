"""Interleaved 1F1B with BPipe in the planner: found, its memory by hand, its flags."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.activations import micro_batch_bytes
from megatron_bpipe.estimate.memory.stages import FIXED_OVERHEAD, memory_by_stage
from megatron_bpipe.estimate.models import llama
from megatron_bpipe.estimate.paper.refined import bytes_moved
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.time.scheduled import budgets_of, held_by_stage, schedule_of
from megatron_bpipe.planner.evaluate import Predictor
from megatron_bpipe.planner.inputs.cluster import preset
from megatron_bpipe.planner.inputs.flags import Fixed, read_flags
from megatron_bpipe.planner.inputs.sources import from_layer_model
from megatron_bpipe.planner.output.megatron_flags import model_flags, plan_flags
from megatron_bpipe.planner.output.show import way_text
from megatron_bpipe.planner.search import search
from megatron_bpipe.planner.space import Question, Refused, shapes
from megatron_bpipe.planner.ways import way_of, ways
from megatron_bpipe.schedule.ops import units
from megatron_bpipe.schedule.validation.occupancy import occupancy

MODEL = llama("7 B", hidden=4096, heads=32, layers=32, seq=4096)
RUN = Run(MODEL, Layout(pp=4), 1, 32, "flash", chunks=2)


@functools.cache
def predictor() -> Predictor:
    """Fitted, which takes a second."""
    return from_layer_model(2, FIXED_OVERHEAD)


def test_budgets_are_from_what_stage_0_holds_to_the_least() -> None:
    """(2(p-1) + (v-1)p + 1) / v = 11/2 to (p + (v-1)p + 1) / v = 9/2."""
    assert budgets_of(RUN) == (5.5, 5, 4.5)
    many = replace(RUN, global_batch=1024)
    assert budgets_of(many) == budgets_of(RUN)
    with pytest.raises(EstimateError, match=r"use 4\.5 or more"):
        schedule_of(replace(RUN, bpipe=True, budget=4))
    with pytest.raises(EstimateError, match="host offload goes neither"):
        replace(RUN, host=True)


@pytest.mark.parametrize("m", [24, 48, 128])
def test_a_short_schedule_holds_what_a_long_one_does(m: int) -> None:
    run = replace(RUN, global_batch=m, bpipe=True)
    counts = [occupancy(line) for line in schedule_of(run).stages]
    assert held_by_stage(run) == tuple((max(own), max(lent)) for own, lent in counts)


def test_memory_is_chunks_held_times_bytes_of_a_chunk() -> None:
    """Budget 9 chunks: stages 0 and 1 hold 9, stage 3 its own 5, and 2 + 1 in flight of stage 0."""
    run = replace(RUN, bpipe=True, budget=4.5)
    chunk = micro_batch_bytes(run, 1) // 2
    found = memory_by_stage(run)
    plain = memory_by_stage(RUN)
    assert [stage.activations // chunk for stage in plain] == [11, 9, 7, 5]
    assert [stage.activations // chunk for stage in found] == [9, 9, 7, 5]
    assert [stage.pool // chunk for stage in found] == [0, 0, 0, 3]
    assert [s.total - s.activations - s.pool for s in found] == [
        s.total - s.activations for s in plain
    ]
    evictions = sum(op.kind.value == "E" for op in schedule_of(run).stages[0])
    assert bytes_moved(run) == 2 * evictions * chunk


@pytest.mark.parametrize(
    ("micro_batch", "tried"),
    [
        # of 2 chunks 11 are held without: 10 are borderline, 9 fit; of 4 chunks 19 without, 18 fit
        (2, {2: [(5, "borderline"), (4.5, "yes")], 4: [(4.5, "yes")]}),
        (4, {2: [(4.5, "no")], 4: [(4.25, "no")], 8: [(4.125, "no")]}),  # the least of each
    ],
)
def test_the_largest_budgets_that_fit(
    micro_batch: int, tried: dict[int, list[tuple[float, str]]]
) -> None:
    fixed = Fixed(tp=1, pp=4, micro_batch=micro_batch, attention="flash")
    question = Question(MODEL, preset("A100-80GB", 4, 4), 32, fixed)
    refused = Refused()
    found: dict[int, list[tuple[float | None, str]]] = {}
    (shape,) = shapes(question, refused)
    for candidate, memory in ways(question, shape, predictor(), refused):
        run = candidate.run
        if way_of(run) == "interleaved BPipe":
            found.setdefault(run.chunks, []).append((run.budget, memory.fits))
    assert found == tried


def test_what_the_user_asks_for_is_planned_and_printed() -> None:
    words = [*model_flags(MODEL), "--bf16", "--bpipe", "--bpipe-budget", "4.5"]
    words += ["--num-layers-per-virtual-pipeline-stage", "4", "--pipeline-model-parallel-size", "4"]
    words += ["--tensor-model-parallel-size", "1", "--micro-batch-size", "1"]
    fixed = read_flags(words).fixed
    found = search(
        Question(MODEL, preset("A100-80GB", 4, 4), 32, fixed, attentions=("flash",)), predictor()
    )
    plan = found.best_of("interleaved BPipe")
    assert plan is not None
    run = plan.candidate.run
    assert (run.bpipe, run.chunks, run.budget) == (True, 2, 4.5)
    assert way_text(run) == "interleaved BPipe, 2 chunks, budget 4.5"
    again = read_flags([*model_flags(MODEL), "--bf16", *plan_flags(run, fixed)]).fixed
    assert (again.bpipe, again.budget, again.layers) == (True, 4.5, fixed.layers)
    thirds = replace(RUN, model=replace(MODEL, layers=24), chunks=3, bpipe=True, budget=13 / 3)
    flags = plan_flags(thirds)
    printed = flags[flags.index("--bpipe-budget") + 1]
    assert printed == "4.334"  # up, for 4.333 would be 12 chunks
    assert units(float(printed), 3) == 13
