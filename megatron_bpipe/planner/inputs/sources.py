"""Where stage times come from: a profile, the re-evaluation's table 5, or the model of a layer."""

from __future__ import annotations

from dataclasses import replace

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G, Gpu
from megatron_bpipe.estimate.memory.activations import (
    FUSED,
    MEGATRON_2023,
    TRANSFORMER_ENGINE,
    Kernels,
)
from megatron_bpipe.estimate.memory.stages import BF16, FP32, StateBytes
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, LAYOUT
from megatron_bpipe.estimate.paper.stage_pace import pace_of_mfu
from megatron_bpipe.estimate.paper.tables import published_constants
from megatron_bpipe.estimate.profile import Profile, check_model
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.layer_model import layer_model
from megatron_bpipe.estimate.time.layer_time import Pace, profiled_pace
from megatron_bpipe.estimate.time.op_costs import Stored
from megatron_bpipe.planner.evaluate import Predictor


def from_layer_model(
    element: int,
    overhead: int,
    kernels: Kernels = TRANSFORMER_ENGINE,
    state: StateBytes | None = None,
) -> Predictor:
    """Stage times by the model of a layer, messages by the links; nothing is fitted but BPipe."""
    kernels = replace(kernels, element=element)
    stored = Stored(kernels, state or (BF16 if element == 2 else FP32), overhead)
    return Predictor(layer_model(kernels), stored, bpipe=published_constants().bpipe)


def from_profile(profile: Profile, model: Model, overhead: int) -> Predictor:
    """Stage times and bytes as measured; raises EstimateError for a profile of another model."""
    check_model(profile, model)
    kernels = replace(FUSED, element=profile.element)
    stored = Stored(kernels, BF16 if profile.element == 2 else FP32, overhead)
    return Predictor(
        profiled_pace(profile), stored, bpipe=published_constants().bpipe, profile=profile
    )


def from_table_5(overhead: int) -> Predictor:
    """The ten stages of the re-evaluation's table 5: its two models, t = 4, A100, Megatron of 2023.

    Messages are as fitted on its table 3.
    """
    stored = Stored(MEGATRON_2023, BF16, overhead)
    constants = published_constants()
    return Predictor(_published, stored, constants.exchange, constants.bpipe)


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
