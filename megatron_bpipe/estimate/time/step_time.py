"""What an iteration takes beside its pipeline: optimizer step, data-parallel messages.

With a distributed optimizer gradients are summed and scattered, and parameters gathered after the
step; otherwise gradients are summed for all.  Overlapped (--overlap-grad-reduce,
--overlap-param-gather) these run beside the last micro-batch's backward and the first one's
forward, bucket by bucket: what is longer than these remains, and one bucket at the least.

Units: seconds, bytes.
"""

from __future__ import annotations

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.memory.stages import StateBytes
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.kernels.collectives import LATENCY

OPTIMIZER_BYTES = 42
"""Memory traffic per parameter of a step: gradient norm (4), Adam reading gradient, master weight
and two moments (16) and writing three (12), copy to bf16 (6), clearing the gradient (4)."""
BUCKET = 40e6
"""Parameters of a bucket, Megatron's least for overlapping (max(40 million, 1 million x d))."""


def step_seconds(
    run: Run,
    stage: int,
    gpu: Gpu,
    link: float,
    state: StateBytes,
    beside: tuple[float, float] = (0.0, 0.0),
) -> float:
    """Optimizer and data-parallel messages of one stage.

    ``link`` bytes/s of gathers between its replicas; ``beside`` seconds of one micro-batch's
    forward and backward there, beside which messages may run (after the last W there is none).
    """
    layout, settings = run.layout, run.settings
    parameters = stage_parameters(run, stage)
    replicas, shards = layout.dp * layout.cp, 1
    owned = float(parameters.total)
    if run.distributed_optimizer:
        shards = replicas
        owned = parameters.dense / shards + parameters.experts / layout.expert_dp
    step = OPTIMIZER_BYTES * owned / (gpu.memory_bandwidth * gpu.memory_share)
    reduced, gathered = 0.0, 0.0
    for number, ranks in ((parameters.dense, replicas), (parameters.experts, layout.expert_dp)):
        if ranks == 1 or not number:
            continue
        passed = (ranks - 1) / ranks * number / link
        again = 1 if run.distributed_optimizer else 2
        reduced += again * state.gradients * passed + LATENCY
        gathered += state.weights * passed + LATENCY if run.distributed_optimizer else 0.0
    share = min(1.0, max(BUCKET, 1e6 * replicas) / max(1, parameters.total))
    forward, backward = beside
    if settings.grad_overlap:
        reduced = max(share * reduced, reduced - backward)
    if settings.param_overlap and run.distributed_optimizer:
        gathered = max(share * gathered, gathered - forward)
    return step + reduced + gathered
