"""What computing costs: seconds of one layer, and of the output layer, for one micro-batch.

A pace comes from the MFU of a single stage (here), from a profile (``profiled_pace``) or from a
model of the layer (``layer_model``).  Everything after that, schedule, messages, transfers,
optimizer, is the same for all three.

Units: seconds, MFU in per cent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.profile import Profile
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.flops import head_flops, layer_flops_equation_1

CROSS_ENTROPY_BYTES = 52
"""Memory traffic per logit of Megatron's cross entropy: to fp32 (6), max (4), subtract (8), exp
(8), sum (4), divide (8), and backwards scale (8) and to bf16 (6).  Read in
megatron/core/tensor_parallel/cross_entropy.py, core_v0.4.0."""


@dataclass(frozen=True)
class Pace:
    """Forward and backward of one layer and of the output layer with its loss."""

    forward: float
    backward: float
    head_forward: float
    head_backward: float

    @property
    def layer(self) -> float:
        """Forward and backward of one layer."""
        return self.forward + self.backward

    @property
    def head(self) -> float:
        """Forward and backward of the output layer."""
        return self.head_forward + self.head_backward


StageTimes = Callable[[Run, Gpu], Pace]
"""The pace of a run on a kind of GPU; raises EstimateError where it is not known."""


def pace_of_mfu(run: Run, gpu: Gpu, stage_mfu: float) -> Pace:
    """From the MFU of a single stage by equation 1; a backward takes twice a forward."""
    peak = gpu.flops * run.layout.tp * run.layout.cp
    flops = layer_flops_equation_1(run.model, run.micro_batch) / run.model.layers
    return thirds(flops / (peak * stage_mfu / 100), head_seconds(run, gpu))


def thirds(layer: float, head: float) -> Pace:
    """A pace whose backwards take twice its forwards."""
    return Pace(layer / 3, 2 * layer / 3, head / 3, 2 * head / 3)


def head_seconds(run: Run, gpu: Gpu) -> float:
    """Output layer and loss, forward and backward: products at the measured share, traffic."""
    peak = gpu.flops * run.layout.tp * run.layout.cp
    logits = run.tokens * run.model.vocab / run.layout.tp
    return (
        head_flops(run.model, run.micro_batch) / (peak * gpu.matmul_share)
        + CROSS_ENTROPY_BYTES * logits / gpu.memory_bandwidth
    )


def messages_seconds(run: Run, gpu: Gpu, element: int = 2) -> float:
    """Messages between the tensor-parallel ranks in one layer's forward; its backward has as many.

    Two all-reduces, or as many gathers and scatters with sequence parallelism: four passes of
    (t-1)/t of the layer's input over NVLink in either case.
    """
    t = run.layout.tp
    return 4 * (t - 1) / t * element * run.tokens * run.model.hidden / gpu.nvlink


def profiled_pace(profile: Profile) -> StageTimes:
    """The pace of whatever the profile measured; the messages that it left out are added.

    The profile must be of the run's model (``profile.check_model``).

    On another kind of GPU than the profile's all times are scaled by the peaks' ratio.
    """

    def pace(run: Run, gpu: Gpu) -> Pace:
        if profile.tp != run.layout.tp:
            raise EstimateError(
                f"tp: the profile was made with tensor-parallel size {profile.tp}, not "
                f"{run.layout.tp}: make one for that size"
            )
        row = profile.stage_row(run.micro_batch, run.attention)
        head = profile.head_row(run.micro_batch)
        if row is None or head is None:
            raise EstimateError(
                f"the profile has no micro-batch {run.micro_batch} with attention "
                f"{run.attention!r}: profile that too"
            )
        failure = row.failure or head.failure
        if failure or not (row.forward and row.backward and head.forward and head.backward):
            raise EstimateError(f"micro-batch {run.micro_batch}: the profile says {failure}")
        scale = profile.device.peak_flops / gpu.flops
        messages = messages_seconds(run, gpu, profile.element)
        return Pace(
            scale * row.forward.median / profile.layers + messages,
            scale * row.backward.median / profile.layers + messages,
            scale * head.forward.median,
            scale * head.backward.median,
        )

    return pace
