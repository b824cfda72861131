"""Where stage times come from: a profile, the paper's table 5, or the model of a layer."""

from __future__ import annotations

from dataclasses import replace

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G, Gpu
from megatron_bpipe.estimate.memory.activations import FUSED, MEGATRON_2023
from megatron_bpipe.estimate.memory.stages import BF16, FP32
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, LAYOUT
from megatron_bpipe.estimate.paper.tables import published_cases, published_constants
from megatron_bpipe.estimate.profile import Profile, check_model
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.layer_model import fit_layer, layer_model
from megatron_bpipe.estimate.time.layer_time import Pace, pace_of_mfu, profiled_pace
from megatron_bpipe.estimate.time.op_costs import Stored
from megatron_bpipe.planner.evaluate import Predictor


def from_layer_model(element: int, overhead: int) -> Predictor:
    """Stage times by the model of a layer, fitted on the ten stages of table 5."""
    kernels = replace(FUSED, element=element)
    times = layer_model(fit_layer(published_cases()), kernels)
    state = BF16 if element == 2 else FP32
    return Predictor(times, published_constants(), Stored(kernels, state, overhead))


def from_profile(profile: Profile, model: Model, overhead: int) -> Predictor:
    """Stage times and bytes as measured; raises EstimateError for a profile of another model."""
    check_model(profile, model)
    kernels = replace(FUSED, element=profile.element)
    state = BF16 if profile.element == 2 else FP32
    stored = Stored(kernels, state, overhead)
    return Predictor(profiled_pace(profile), published_constants(), stored, profile)


def from_table_5(overhead: int) -> Predictor:
    """The ten stages of the paper's table 5: its two models, t = 4, A100, Megatron of 2023."""
    stored = Stored(MEGATRON_2023, BF16, overhead)
    return Predictor(_published, published_constants(), stored)


def _published(run: Run, gpu: Gpu) -> Pace:
    if gpu != A100_80G:
        raise EstimateError(f"{gpu.name}: table 5 was measured on {A100_80G.name}")
    if run.layout.tp != LAYOUT.tp:
        raise EstimateError(f"tp {run.layout.tp}: table 5 was measured with {LAYOUT.tp}")
    wanted = (run.model.name, run.micro_batch, run.attention)
    for e in EXPERIMENTS:
        if (e.model, e.micro_batch, e.attention) == wanted:
            return pace_of_mfu(run, gpu, e.stage_mfu)
    raise EstimateError(
        f"{wanted[0]} with micro-batch {wanted[1]} and attention {wanted[2]!r} is not in table 5"
    )
