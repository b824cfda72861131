"""The pace of a layer nobody has measured: what its kernels compute, read, write and send.

::

    layer = launch + slowdown x matrix products + traffic + weights + messages

* matrix products at the share of the peak that a large one reaches (``Gpu.matmul_share``);
* traffic: what the layer keeps for its backward is written and read once forwards and twice that
  backwards; attention without flash moves its s x s matrices besides (``_score_bytes``), many more
  of them where the fused softmax kernel cannot run (``softmax_trap``);
* weights: read forwards and backwards, their fp32 gradients read and written once;
* messages between the tensor-parallel ranks.

``slowdown`` (products that do not reach that share) and ``launch`` (seconds that do not depend on
the micro-batch: launches, latency of messages) are fitted on the ten single stages of the paper's
table 5.  Everything else is a datasheet's figure or a count.  ``left_out`` says how well each stage
is predicted by the others.  All ten are A100s with t = 4 and Megatron of 2023: anywhere else this
is an extrapolation, and a profile is better.

Units: seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.activations import FUSED, Kernels, layer_activations
from megatron_bpipe.estimate.memory.parameters import layer_parameters
from megatron_bpipe.estimate.paper.refined import Measured
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.flops import layer_flops, layer_flops_equation_1
from megatron_bpipe.estimate.time.fused_softmax_rules import why_not_fused
from megatron_bpipe.estimate.time.layer_time import (
    Pace,
    StageTimes,
    head_seconds,
    messages_seconds,
    thirds,
)


@dataclass(frozen=True)
class LayerConstants:
    """The fitted constants: a factor, and seconds of one layer's forward and backward."""

    slowdown: float
    launch: float


def layer_model(constants: LayerConstants, kernels: Kernels = FUSED) -> StageTimes:
    """The pace of any run on any GPU."""

    def pace(run: Run, gpu: Gpu) -> Pace:
        products, forward, backward = _parts(run, gpu, kernels)
        forward += (constants.slowdown * products + constants.launch) / 3
        backward += 2 * (constants.slowdown * products + constants.launch) / 3
        if run.attention == "full":
            backward += forward
        head = thirds(0.0, head_seconds(run, gpu))
        return replace(head, forward=forward, backward=backward)

    return pace


def fit_layer(cases: Sequence[Measured]) -> LayerConstants:
    """Least squares of the relative errors; needs two different stages."""
    # seconds = slowdown x products + launch + known; divided by the measured seconds
    a = b = c = d = e = 0.0
    for case in cases:
        measured = _measured_layer(case)
        products, forward, backward = _parts(case.run, case.gpu, case.kernels)
        x, y = products / measured, 1 / measured
        z = 1 - (forward + backward) / measured
        a, b, c, d, e = a + x * x, b + x * y, c + y * y, d + x * z, e + y * z
    determinant = a * c - b * b
    return LayerConstants((d * c - e * b) / determinant, (a * e - b * d) / determinant)


def left_out(cases: Sequence[Measured]) -> tuple[float, ...]:
    """Predicted over measured seconds of each stage, with constants fitted on all others."""
    ratios = []
    for i, case in enumerate(cases):
        constants = fit_layer([*cases[:i], *cases[i + 1 :]])
        predicted = layer_model(constants, case.kernels)(case.run, case.gpu).layer
        ratios.append(predicted / _measured_layer(case))
    return tuple(ratios)


def _measured_layer(case: Measured) -> float:
    run, peak = case.run, case.gpu.flops * case.run.layout.tp * case.run.layout.cp
    flops = layer_flops_equation_1(run.model, run.micro_batch) / run.model.layers
    return flops / (peak * case.stage_mfu / 100)


@lru_cache(maxsize=4096)
def _parts(run: Run, gpu: Gpu, kernels: Kernels) -> tuple[float, float, float]:
    """Seconds of the matrix products, and of everything known in forward and backward."""
    model, layout = run.model, run.layout
    rate = gpu.flops * gpu.matmul_share * layout.tp * layout.cp
    products = layer_flops(model, run.micro_batch) / rate
    flash = layer_activations(replace(run, attention="flash"), kernels)
    kept = sum(flash.values()) / gpu.memory_bandwidth
    messages = messages_seconds(run, gpu, kernels.element)
    weights = layer_parameters(model, layout).total / gpu.memory_bandwidth
    forward = 2 * kept + messages + kernels.element * weights
    backward = 4 * kept + messages + (kernels.element + 8) * weights
    if run.attention in ("none", "recompute"):
        scores = run.tokens * model.seq * model.heads / layout.tp / gpu.memory_bandwidth
        there, back = _score_bytes(run, kernels)
        again = run.attention == "recompute"
        forward += there * scores
        backward += (back + (there if again else 0)) * scores
        if again:  # the two products of attention once more
            products += 4 * run.micro_batch * model.seq**2 * model.hidden / rate
    return products, forward, backward


def _score_bytes(run: Run, kernels: Kernels) -> tuple[float, float]:
    """Memory traffic per element of the s x s matrices, forwards and backwards.

    With e bytes an element.  Forwards: scores written (e), softmax (2 e), read for the context (e).
    Backwards: probabilities read (e), their gradient written (e), softmax (3 e), read for queries
    and for keys (2 e).  Dropout reads, writes and keeps a mask each way (2 e + mask).  Where the
    fused kernel cannot run, softmax is five kernels, in fp32 between two conversions, each way.
    """
    e = kernels.element
    there, back = 4.0 * e, 7.0 * e
    if run.model.dropout:
        there, back = there + 2 * e + kernels.mask, back + 2 * e + kernels.mask
    heads = run.model.heads // run.layout.tp
    if e == 2 and why_not_fused(run.micro_batch, heads, run.model.seq):
        there += (6 + 8 + 9 + 8 + 6) - 2 * e  # convert, scale, mask, softmax, convert
        back += (6 + 12 + 9 + 8 + 6) - 3 * e
    return there, back
