"""A layer's pace from the MFU of a single stage (table 5), by equation 1.

Units: seconds, MFU in per cent.
"""

from __future__ import annotations

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.flops import head_flops, layer_flops_equation_1
from megatron_bpipe.estimate.time.kernels.head_time import LOSS_BACKWARD, LOSS_FORWARD
from megatron_bpipe.estimate.time.layer_time import Pace, thirds

LARGE_PRODUCT = 267.9e12 / 312e12
"""Share of an A100's peak at 6912 x 16384 x 2048: table of maximum achievable matmul FLOPS in
github.com/stas00/ml-engineering, compute/accelerator."""


def pace_of_mfu(run: Run, gpu: Gpu, stage_mfu: float) -> Pace:
    """From the MFU of a single stage by equation 1; a backward takes twice a forward."""
    peak = gpu.flops * run.layout.tp * run.layout.cp
    flops = layer_flops_equation_1(run.model, run.micro_batch) / run.model.layers
    return thirds(flops / (peak * stage_mfu / 100), head_seconds(run, gpu))


def head_seconds(run: Run, gpu: Gpu) -> float:
    """Output layer and loss, forward and backward: products at the measured share, traffic."""
    peak = gpu.flops * run.layout.tp * run.layout.cp
    logits = run.tokens * run.model.vocab / run.layout.tp
    return (
        head_flops(run.model, run.micro_batch) / (peak * LARGE_PRODUCT)
        + (LOSS_FORWARD + LOSS_BACKWARD) * logits / gpu.memory_bandwidth
    )
