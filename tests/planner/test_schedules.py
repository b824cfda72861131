"""ZB-H1 and the V shapes as ways of the planner: memory and time by hand, what forbids them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.memory.stages import memory_by_stage
from megatron_bpipe.estimate.models import gpt
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.estimate.time.layer_time import Apart, Pace
from megatron_bpipe.estimate.time.op_costs import Stored
from megatron_bpipe.estimate.time.scheduled import held_by_stage
from megatron_bpipe.estimate.time.weight_time import weight_share
from megatron_bpipe.planner.evaluate import Predictor, least_seconds, place, seconds_of
from megatron_bpipe.planner.inputs.cluster import preset
from megatron_bpipe.planner.inputs.flags import read_flags
from megatron_bpipe.planner.output.megatron_flags import model_flags, plan_flags
from megatron_bpipe.planner.shape import folded
from megatron_bpipe.planner.ways import way_of

S, H, V = 256, 512, 51200
MODEL = gpt("small", hidden=H, heads=8, layers=8, seq=S, vocab=V)
RUN = Run(MODEL, Layout(pp=4), 1, 8, "flash")
ZB = replace(RUN, schedule="zb-h1")
HALF, MIN, FULL = (replace(RUN, schedule=name, chunks=2) for name in ("v-half", "v-min", "v-zb"))
UNIT = S * H
LAYER, LEFT = 34 * UNIT, 32 * UNIT
"""A GPT layer in bf16 keeps 34 s b h bytes (Korthikanti et al. 2022) to its B, then 16 elements."""


def test_zb_h1_holds_as_much_on_every_stage() -> None:
    """p = 4 at two layers a stage, read off its timetable (docs/schedules/README.md).

    Stage 0 holds 4 before B0 (with a mask of the embedding's dropout each).  When B2 runs, stage 2
    has micro-batches 2 and 3 whole, 0 and 1 wait for W.  On stage 3 all four wait at W0, with input
    and gradient of the output layer.
    """
    found = [stage.activations for stage in memory_by_stage(ZB)]
    assert found[0] == 4 * (2 * LAYER + UNIT)
    assert found[2] == 2 * 2 * LAYER + 2 * 2 * LEFT
    assert found[3] == 4 * (2 * LEFT + 2 * S * (H + V))
    plain = [stage.activations for stage in memory_by_stage(RUN)]
    assert plain == [4 * (2 * LAYER + UNIT), 6 * LAYER, 4 * LAYER, 2 * LAYER]


@pytest.mark.parametrize(
    ("schedule", "p", "held"),
    [
        ("v-half", 4, (3, 3.5)),
        ("v-half", 8, (5, 5.5)),
        ("v-min", 4, (2, 2)),
        ("v-min", 8, (3, 4)),
        ("v-zb", 4, (4, 4)),
        ("v-zb", 8, (8, 8)),
        ("zb-h1", 4, (4, 4)),
        ("zb-h1", 8, (8, 8)),
    ],
)
@pytest.mark.parametrize("m", [24, 203])
def test_peaks_are_those_measured(schedule: str, p: int, held: tuple[float, float], m: int) -> None:
    """Least and most of all stages, in micro-batches, as docs/schedules/v-placement.md has them."""
    chunks = 1 if schedule == "zb-h1" else 2
    model = replace(MODEL, layers=2 * p)
    run = Run(model, Layout(pp=p), 1, m, "flash", chunks=chunks, schedule=schedule)
    counts = [own / chunks for own, _ in held_by_stage(run)]
    assert (min(counts), max(counts)) == held


def test_stage_0_has_both_ends_under_the_v_placement() -> None:
    """Embedding with positions, final norm, and the output layer: tied or not with a copy."""
    layers = 2 * (12 * H * H + 13 * H)
    for tied in (True, False):
        run = replace(HALF, model=replace(MODEL, tied_embeddings=tied))
        first, *others = (stage_parameters(run, stage).total for stage in range(4))
        assert first == layers + V * H + S * H + V * H + 2 * H
        assert others == [layers] * 3
    logits = [stage.logits for stage in memory_by_stage(HALF)]
    assert logits[0] > 0
    assert logits[1:] == [0, 0, 0]
    # outputs of the head are never kept beside another op: B follows its F at once
    chunks = [stage.activations for stage in memory_by_stage(HALF)]
    # 3.5 micro-batches of two layers, some of which wait for W
    assert 7 * LEFT < max(chunks[1:]) < 7 * LAYER


def test_uneven_layers_lie_where_the_placement_puts_them() -> None:
    """Parts in the order that a micro-batch meets them: stage x has x and 2p-1-x."""
    run = replace(HALF, model=replace(MODEL, layers=11), partition=(1, 2, 1, 2, 1, 2, 1, 1))
    assert [run.layers_of(stage) for stage in range(4)] == [2, 3, 3, 3]
    assert folded((3, 2, 2, 4)) == (2, 1, 1, 2, 2, 1, 1, 1)
    kinds = replace(MODEL, layers=8, experts=4, moe_layers="01111111")
    first = replace(HALF, model=kinds).kinds_of(0)
    assert first == {"dense": 1, "moe": 1}


def even(forward: float, backward: float, weight: float) -> Predictor:
    """Stages of two layers with these seconds in all, and nothing else that takes time."""

    def times(run: Run, gpu: Gpu) -> Pace:
        layer = forward / 2, (backward + weight) / 2
        return Pace(*layer, 0.0, 0.0, apart=Apart((backward / 2, weight / 2), (0.0, 0.0)))

    return Predictor(times, Stored(), exchange=1e-30)


def seconds(run: Run, predictor: Predictor) -> tuple[float, float]:
    candidate = place(run, preset("A100-80GB", 4, 4), predictor)
    return seconds_of(candidate, predictor), least_seconds(candidate)


@pytest.mark.parametrize(("f", "b", "w"), [(1.0, 1.0, 1.0), (1.0, 1.2, 0.9)])
@pytest.mark.parametrize("m", [8, 200])
def test_time_by_the_papers_formulas(f: float, b: float, w: float, m: int) -> None:
    """1F1B idles for (p-1)(F+B+W), ZB-H1 for (p-1)(F+B-W), 2BW in its steady state for nothing."""
    predictor = even(f, b, w)
    work, p = m * (f + b + w), 4
    for run, idle in (
        (RUN, (p - 1) * (f + b + w)),
        (ZB, (p - 1) * (f + b - w)),
        (replace(RUN, schedule="pipedream-2bw"), 0.0),
    ):
        found, least = seconds(replace(run, global_batch=m), predictor)
        assert found == pytest.approx(work + idle, rel=1e-3), way_of(run)
        assert least <= found


@pytest.mark.parametrize(
    ("run", "units"),
    [(ZB, 27), (replace(ZB, bpipe=True), 30), (HALF, 29.5), (MIN, 29.5), (FULL, 26.5)],
)
def test_time_is_that_of_the_drawn_timetable(run: Run, units: float) -> None:
    """F = B = W = 1 a stage, p = 4, m = 8: docs/schedules/README.md, and rivals.json unpaced."""
    found, least = seconds(run, replace(even(1.0, 1.0, 1.0), bpipe=0.0))
    assert found == pytest.approx(units, rel=1e-3)
    assert least <= found


def test_attention_has_no_w() -> None:
    """A token's layer forwards: 24 h^2 in matrices, 4 s h in scores and context.

    Matrices twice backwards; attention twice, in one kernel 2.5 times on half the scores; what is
    recomputed is B's.
    """
    linear, scores = 24 * H * H, 4 * S * H
    for attention, backward in (
        ("none", 2 * linear + 2 * scores),
        ("recompute", 2 * linear + 3 * scores),
        ("flash", 2 * linear + 2.5 * scores / 2),
        ("full", 3 * linear + 3.5 * scores / 2),
    ):
        found = weight_share(replace(RUN, attention=attention), "dense")  # type: ignore[arg-type]
        assert found == pytest.approx(linear / backward)


WORDS = [*model_flags(MODEL), "--bf16", "--pipeline-model-parallel-size", "4"]


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (["--mtp-num-layers", "1"], {"zb-h1", "v-half", "v-min", "v-zb"}),
        (["--use-torch-fsdp2"], {"zb-h1", "v-half", "v-min", "v-zb", "pipedream-2bw"}),
        (["--init-model-with-meta-device"], {"v-half", "v-min", "v-zb"}),
        (["--save", "x", "--ckpt-format", "torch"], {"v-half", "v-min", "v-zb"}),
        (["--ckpt-format=torch"], set()),
        (["--save", "x"], {"v-half", "v-min", "v-zb"}),
        (["--save", "x", "--no-save-optim"], set()),
        (["--save", "x", "--dist-ckpt-optim-fully-reshardable"], set()),
        (["--num-experts", "8"], {"pipedream-2bw"}),
        (["--rerun-mode", "validate_results"], {"pipedream-2bw"}),
        (["--mtp-num-layers", "0"], set()),
    ],
)
def test_what_the_checks_refuse_is_not_proposed(more: list[str], refused: set[str]) -> None:
    """And asked for it is refused by name, with the reason of the check before training."""
    found = set(read_flags([*WORDS, *more]).fixed.refused)
    assert found & {"zb-h1", "v-half", "v-min", "v-zb", "pipedream-2bw"} == refused
    for name in refused:
        named = "|".join(word for word in more if word.startswith("--"))
        with pytest.raises(
            EstimateError, match=f"--bpipe-schedule {name} cannot run with ({named})"
        ):
            read_flags([*WORDS, *more, "--bpipe-schedule", name])


def test_flags_say_the_schedule_and_what_goes_with_it() -> None:
    flags = plan_flags(HALF)
    assert flags[flags.index("--bpipe-schedule") + 1] == "v-half"
    assert flags[flags.index("--num-layers-per-virtual-pipeline-stage") + 1] == "1"
    again = read_flags([*model_flags(MODEL), "--bf16", *flags]).fixed
    assert (again.schedule, again.bpipe) == ("v-half", None)
    assert again.layers.on(4, 8) == (2, ())
    lagging = plan_flags(replace(RUN, schedule="pipedream-2bw", layout=Layout(pp=4, dp=2)))
    assert lagging[lagging.index("--rerun-mode") + 1] == "disabled"
    assert "--use-distributed-optimizer" not in lagging


def test_what_the_planner_does_not_know_is_refused_by_name() -> None:
    for more, why in (
        (["chimera"], "chimera: it runs, but the planner does not know it"),
        (["pipedream-2bw", "--bpipe"], "pipedream-2bw: the planner knows it without --bpipe only"),
        (["nothing"], "--bpipe-schedule nothing: use one of"),
    ):
        with pytest.raises(EstimateError, match=why):
            read_flags([*WORDS, "--bpipe-schedule", *more])
