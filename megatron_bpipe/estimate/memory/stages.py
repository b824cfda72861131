"""Memory of each stage at its peak, and whether it fits.

Weights, gradients and optimizer state follow the parameters; activations follow the schedule: how
many micro-batches a stage holds, and how many slots it lends, is read from the very schedule that
is executed (1F1B, or that with the balance pass), transfers in flight counted on both sides.

Units: bytes per GPU; GiB = 2^30 bytes where named so.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.activations import (
    FUSED,
    Kernels,
    layer_activations,
    micro_batch_bytes,
    softmax_bytes,
)
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.models import padded_vocab
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.scheduled import held_by_stage
from megatron_bpipe.schedule.ops import partner

GIB = 2**30

FIXED_OVERHEAD = 3 * GIB
"""CUDA context, NCCL and cuBLAS buffers, fragmentation of the allocator.  An assumption, not
measured: with anything from 0 to 5 GiB all ten rows of table 3 fit as run, and rows 3, 6, 8 and 10
do not clearly fit without BPipe (tested)."""

BORDERLINE = 0.05
"""Within this share of the capacity nothing is claimed."""

Verdict = Literal["yes", "no", "borderline"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of weights, gradients and optimizer state."""

    weights: int
    gradients: int
    optimizer: int


BF16 = StateBytes(weights=2, gradients=4, optimizer=12)
"""bf16 weights, fp32 gradients, fp32 master weights and two Adam moments: 18 in all."""
FP32 = StateBytes(weights=4, gradients=4, optimizer=8)
"""fp32 throughout with two Adam moments: 16 in all."""


@dataclass(frozen=True)
class StageMemory:
    """One GPU of one stage, in bytes.

    ``activations`` are this stage's own micro-batches, ``pool`` the slots it lends, ``logits`` the
    output layer's working memory (last stage), ``recompute`` what one layer makes anew in its
    backward, ``overhead`` a named constant.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    pool: int
    logits: int
    recompute: int
    overhead: int

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_by_stage(
    run: Run,
    kernels: Kernels = FUSED,
    state: StateBytes = BF16,
    overhead: int = FIXED_OVERHEAD,
) -> tuple[StageMemory, ...]:
    """The peak of each stage from 0 to p-1 under 1F1B, with BPipe where the run has it."""
    return tuple(
        _stage_memory(run, stage, kernels, state, overhead) for stage in range(run.layout.pp)
    )


def peak_gib(
    run: Run,
    kernels: Kernels = FUSED,
    state: StateBytes = BF16,
    overhead: int = FIXED_OVERHEAD,
) -> float:
    """The fullest stage, in GiB."""
    return max(stage.total for stage in memory_by_stage(run, kernels, state, overhead)) / GIB


def verdict(needed_gib: float, capacity_gib: float = 80.0) -> Verdict:
    """Whether this fits: "borderline" within 5 % of the capacity, on either side.

    Raises EstimateError for a capacity that is not positive.
    """
    if capacity_gib <= 0:
        raise EstimateError(f"a GPU of {capacity_gib} GiB: give its memory in GiB, for example 80")
    if abs(needed_gib - capacity_gib) <= BORDERLINE * capacity_gib:
        return "borderline"
    return "yes" if needed_gib < capacity_gib else "no"


def _stage_memory(
    run: Run, stage: int, kernels: Kernels, state: StateBytes, overhead: int
) -> StageMemory:
    layout, held = run.layout, held_by_stage(run)
    parameters = stage_parameters(run, stage)
    shards, expert_shards = 1, 1
    if run.distributed_optimizer:
        shards, expert_shards = layout.dp * layout.cp, layout.dp * layout.cp // layout.ep
    optimizer = parameters.dense / shards + parameters.experts / expert_shards
    other = partner(stage, layout.pp)
    lent = 0 if other is None else held[other][1]
    evicted = 0 if other is None else micro_batch_bytes(run, other, kernels)
    last = stage == layout.pp - 1
    return StageMemory(
        weights=state.weights * parameters.total,
        gradients=state.gradients * parameters.total,
        optimizer=round(state.optimizer * optimizer),
        activations=held[stage][0] * (micro_batch_bytes(run, stage, kernels) // run.chunks),
        pool=lent * evicted,
        logits=_logits(run, kernels) if last else 0,
        recompute=_recomputed(run, kernels),
        overhead=overhead,
    )


def _recomputed(run: Run, kernels: Kernels) -> int:
    """What one layer's backward makes anew: its attention, or all of it (with flash attention)."""
    if run.attention == "recompute":
        return softmax_bytes(run, kernels)
    if run.attention == "full":
        return sum(layer_activations(replace(run, attention="flash"), kernels).values())
    return 0


def _logits(run: Run, kernels: Kernels) -> int:
    """Output layer of one micro-batch: inputs of norm and matrix, logits, two fp32 copies of them.

    Megatron converts the logits to fp32 and subtracts their maximum into a new tensor, which then
    becomes the softmax in place (megatron/core/tensor_parallel/cross_entropy.py, core_v0.4.0).
    """
    model, layout = run.model, run.layout
    logits = run.tokens * padded_vocab(model.vocab, layout.tp) // layout.tp
    return head_saved_bytes(run, kernels) + (kernels.element + 4) * logits


def head_saved_bytes(run: Run, kernels: Kernels = FUSED) -> int:
    """What the output layer of one micro-batch keeps from its forward to its backward.

    Inputs of the final norm (normalised too, where it is composed) and of the matrix, and the fp32
    softmax; the rest of ``logits`` is gone when the forward is over.
    """
    if kernels.head is not None:
        return kernels.head
    tensors = 3 if kernels.composed and run.model.norm == "rmsnorm" else 2
    inputs = tensors * kernels.element * run.tokens * run.model.hidden // run.layout.sp
    vocab = padded_vocab(run.model.vocab, run.layout.tp) // run.layout.tp
    return inputs + 4 * run.tokens * vocab
