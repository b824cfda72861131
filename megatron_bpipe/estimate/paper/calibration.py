"""Whether an estimate stays inside the range that its constants were fitted on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.paper.refined import Measured
from megatron_bpipe.estimate.runs import Run


def outside_calibration(run: Run, gpu: Gpu, cases: Sequence[Measured]) -> tuple[str, ...]:
    """What of this run lies outside all fitted runs, in words; empty when nothing does."""
    outside = []
    gpus = sorted({case.gpu.name for case in cases})
    if gpu.name not in gpus:
        outside.append(f"{gpu.name}: fitted on {', '.join(gpus)}")
    for name, value, known in (
        ("hidden size", run.model.hidden, [c.run.model.hidden for c in cases]),
        ("sequence length", run.model.seq, [c.run.model.seq for c in cases]),
        ("layers per stage", run.layers_per_stage, [c.run.layers_per_stage for c in cases]),
        ("stages", run.layout.pp, [c.run.layout.pp for c in cases]),
        ("tensor-parallel size", run.layout.tp, [c.run.layout.tp for c in cases]),
        ("context-parallel size", run.layout.cp, [c.run.layout.cp for c in cases]),
        ("data-parallel size", run.layout.dp, [c.run.layout.dp for c in cases]),
        ("expert-parallel size", run.layout.ep, [c.run.layout.ep for c in cases]),
        ("micro-batch", run.micro_batch, [c.run.micro_batch for c in cases]),
        ("micro-batches", run.micro_batches, [c.run.micro_batches for c in cases]),
    ):
        low, high = min(known), max(known)
        if not low <= value <= high:
            span = str(low) if low == high else f"{low} to {high}"
            outside.append(f"{name} {value}: fitted on {span}")
    return tuple(outside)
