"""Memory of each stage at its peak, and whether it fits.

Weights, gradients and optimizer state follow the parameters; activations follow the schedule: how
many micro-batches a stage holds, and how many slots it lends, is read from the very schedule that
is executed, transfers in flight counted on both sides.  Where it splits the backward, what waits
between B and W is counted in its own bytes, chunk by chunk.  On top comes what is there for a
moment only: the loss with its logits, what a layer's backward makes, the word embedding's gradient.

Units: bytes per GPU; GiB = 2^30 bytes where named so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Literal

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.activations import (
    FUSED,
    NOTHING,
    Kernels,
    Sizes,
    chunk_bytes,
    expert_rows,
    layer_activations,
    layer_sizes,
    micro_batch_bytes,
    softmax_bytes,
    whole_layer,
)
from megatron_bpipe.estimate.memory.parameters import (
    Parameters,
    matrix_shapes,
    stage_parameters,
)
from megatron_bpipe.estimate.memory.weight_gradients import left_for_weight
from megatron_bpipe.estimate.models import padded_vocab
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.scheduled import held_by_stage, moments_by_stage
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec
from megatron_bpipe.schedule.flush_free.plan import versions_kept
from megatron_bpipe.schedule.ops import partner

GIB = 2**30

FIXED_OVERHEAD = 3 * GIB
"""CUDA context, NCCL buffers, fragmentation of the allocator: what the allocator does not count as
allocated.  An assumption, not measured: with anything from 0 to 5 GiB all ten rows of table 3 fit
as run, and rows 3, 6, 8 and 10 do not clearly fit without BPipe (tested)."""

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
FP16 = StateBytes(weights=2, gradients=2, optimizer=12)
"""fp16 as Megatron has it without --accumulate-allreduce-grads-in-fp32, which only bf16 implies:
gradients are kept in fp16, 16 bytes in all."""
FP32 = StateBytes(weights=4, gradients=4, optimizer=8)
"""fp32 throughout with two Adam moments: 16 in all."""


@dataclass(frozen=True)
class StageMemory:
    """One GPU of one stage, in bytes.

    ``activations`` are this stage's own micro-batches, with what waits for their W, ``pool`` the
    slots it lends, ``logits`` the output layer's working memory (on its stage), ``recompute`` what
    one layer makes anew in its
    backward, ``backward`` the gradients that are alive in a layer's backward, ``embedding`` the
    word embedding's gradient, which is there when one micro-batch is gone already.
    ``overhead`` is a named constant.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    pool: int
    logits: int
    recompute: int
    backward: int
    embedding: int
    overhead: int

    @property
    def working(self) -> int:
        """What is there for a moment only; these moments differ."""
        return max(self.logits, self.recompute + self.backward, self.embedding)

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator hands out at the peak (torch.cuda.max_memory_allocated)."""
        static = self.weights + self.gradients + self.optimizer
        return static + self.activations + self.pool + self.working

    @property
    def total(self) -> int:
        """Everything together, with what the allocator does not see."""
        return self.allocated + self.overhead


def memory_by_stage(
    run: Run,
    kernels: Kernels = FUSED,
    state: StateBytes = BF16,
    overhead: int = FIXED_OVERHEAD,
) -> tuple[StageMemory, ...]:
    """The peak of each stage from 0 to p-1 under the run's schedule."""
    sizes = layer_sizes(run, kernels)
    like = _first_alike(run)
    once = {x: micro_batch_bytes(run, x, kernels, sizes) for x in set(like)}
    each = tuple(once[x] for x in like)
    static = {x: (stage_parameters(run, x), _placeholders(run, x, kernels)) for x in set(like)}
    alike = (_logits(run, kernels), _recomputed(run, kernels), _layer_gradients(run, kernels))
    own = _held_bytes(run, each, like, sizes, kernels)
    first = chunk_bytes(run, 0, 0, sizes)
    if run.entry.splits_backward:
        first -= left_for_weight(run, 0, False, kernels, 0)  # which waits for W
    # its first chunk is gone by then
    embedding = max(0, _embedding_gradient(run, kernels) - max(0, first))
    found = []
    for stage in range(run.layout.pp):
        memory = _stage_memory(run, stage, own[stage], each, *static[like[stage]], state)
        logits = alike[0] if stage == run.head_stage else 0
        found.append(
            StageMemory(
                *memory, logits, *alike[1:], embedding if stage == 0 else 0, overhead=overhead
            )
        )
    return tuple(found)


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


def _first_alike(run: Run) -> list[int]:
    """For each stage the first one with as many layers in each chunk and the same ends."""
    last = run.layout.pp - 1
    if run.model.moe_layers:
        return list(range(last + 1))
    first: dict[tuple[object, ...], int] = {}
    found = []
    for x in range(last + 1):
        sizes = [run.partition[run.part(x, c)] for c in range(run.chunks)] if run.partition else ()
        found.append(first.setdefault((x == 0, x == run.head_stage, x == last, *sizes), x))
    return found


def _stage_memory(
    run: Run,
    stage: int,
    own: int,
    each: Sequence[int],
    parameters: Parameters,
    placeholders: int,
    state: StateBytes,
) -> tuple[int, int, int, int, int]:
    """Weights, gradients, optimizer, activations and pool of one stage.

    ``own`` bytes of its activations; ``each`` has those of one micro-batch on every stage;
    ``placeholders`` see ``_placeholders``.
    """
    layout = run.layout
    shards, expert_shards = 1, 1
    if run.distributed_optimizer:
        shards, expert_shards = layout.dp * layout.cp, layout.expert_dp
    optimizer = parameters.dense / shards + parameters.experts / expert_shards
    other = partner(stage, layout.pp) if run.bpipe else None
    return (
        _versions(run, stage) * state.weights * parameters.total,
        state.gradients * parameters.total + placeholders,
        round(state.optimizer * optimizer),
        own,
        0 if other is None else held_by_stage(run)[other][1] * (each[other] // run.chunks),
    )


def _held_bytes(
    run: Run, each: Sequence[int], like: Sequence[int], sizes: Sizes, kernels: Kernels
) -> list[int]:
    """Activations of every stage at their peak; ``like`` see ``_first_alike``."""
    if not run.entry.splits_backward:
        held = held_by_stage(run)
        return [held[x][0] * (bytes_ // run.chunks) for x, bytes_ in enumerate(each)]
    chunks = {x: _chunk_bytes(run, x, each[x], sizes, kernels) for x in set(like)}
    found = []
    for stage, moments in enumerate(moments_by_stage(run)):
        whole, left = chunks[like[stage]]
        head = head_saved_bytes(run, kernels) if stage == run.head_stage else 0
        found.append(
            max(
                sum(map(mul, moment.whole, whole))
                + sum(map(mul, moment.waiting, left))
                + moment.heads * head
                for moment in moments
            )
        )
    return found


def _chunk_bytes(
    run: Run, stage: int, each: int, sizes: Sizes, kernels: Kernels
) -> tuple[list[int], list[int]]:
    """What one activation of each chunk of a stage keeps before B, and between B and W.

    ``each`` is what one micro-batch keeps on the stage.
    """
    last = run.chunks - 1 if stage == run.head_stage else None
    whole = [chunk_bytes(run, stage, chunk, sizes) for chunk in range(run.chunks)]
    left = [left_for_weight(run, stage, c == last, kernels, c) for c in range(run.chunks)]
    whole[0] += each - sum(whole)  # what the embedding keeps
    return whole, left


def _versions(run: Run, stage: int) -> int:
    """Of its weights that a stage keeps: more than one under a schedule without a flush."""
    if run.entry.without_flush is None:
        return 1
    return versions_kept(ScheduleSpec(run.base, run.layout.pp, 1), stage)


def _placeholders(run: Run, stage: int, kernels: Kernels) -> int:
    """One gradient for each shape of a stage's matrices, see ``Kernels.placeholders``."""
    if not (kernels.placeholders and run.settings.grad_fusion):
        return 0
    shapes: set[tuple[int, int]] = set()
    for kind in run.kinds_of(stage):
        shapes |= matrix_shapes(run.model, run.layout, kind)
    return kernels.element * sum(rows * columns for rows, columns in shapes)


def _embedding_gradient(run: Run, kernels: Kernels) -> int:
    """Gradient of the word embedding, a tensor of its own before it is added to the others."""
    return kernels.element * _vocab(run) * run.model.hidden


def _recomputed(run: Run, kernels: Kernels) -> int:
    """What one layer's backward makes anew: parts of it, or so many whole layers."""
    recompute = run.recomputes
    if not recompute.active:
        return 0
    kinds = run.model.kinds
    if recompute.method:
        layers = max(1, recompute.layers) if recompute.method == "uniform" else 1
        return layers * max(sum(whole_layer(run, kernels, kind).values()) for kind in kinds)
    if recompute.modules == ("core_attn",):
        return 0 if run.one_kernel else softmax_bytes(run, kernels)
    whole = replace(run, recompute=NOTHING)
    return max(
        sum(layer_activations(whole, kernels, kind).values())
        - sum(layer_activations(run, kernels, kind).values())
        for kind in kinds
    )


def _layer_gradients(run: Run, kernels: Kernels) -> int:
    """Gradients that live at once in the backward of an FFN, the widest part of a layer.

    First those of the inner activation and of the first matrix's output, then the latter with
    those of the FFN's input and that input gathered from all tensor-parallel ranks; beside them the
    gradient of the layer's output on both sides of the residual connection.
    """
    model, layout = run.model, run.layout
    width = 2 if model.gated else 1
    found = 0
    for kind in model.kinds:
        inner = run.tokens * model.ffn // layout.tp
        if kind == "moe":
            inner = expert_rows(run) * model.expert_width // layout.expert_tp
        outer = run.tokens * model.hidden
        found = max(found, (1 + width) * inner, width * inner + 2 * outer)
    return kernels.element * (found + 2 * run.tokens * model.hidden // layout.sp)


def _logits(run: Run, kernels: Kernels) -> int:
    """Output layer of one micro-batch, at the larger of two moments.

    In the loss: logits and their fp32 copies, of which the softmax is one in place
    (megatron/core/tensor_parallel/cross_entropy.py).  A fused loss works in place.  Later, without
    fused accumulation, the gradients of logits and of the matrix.
    """
    logits = run.tokens * _vocab(run)
    inputs = _head_inputs(run, kernels)
    loss = (kernels.element + 4 * kernels.fp32_logits) * logits
    if run.settings.loss_fusion:
        loss = 2 * kernels.element * logits
    matrix = 0 if run.settings.grad_fusion else kernels.element * _vocab(run) * run.model.hidden
    return inputs + max(loss, kernels.element * logits + matrix)


def head_saved_bytes(run: Run, kernels: Kernels = FUSED) -> int:
    """What the output layer of one micro-batch keeps from its forward to its backward.

    Inputs of the final norm (normalised too, where it is composed) and of the matrix, and the fp32
    softmax; the rest of ``logits`` is gone when the forward is over.
    """
    if kernels.head is not None:
        return kernels.head
    return _head_inputs(run, kernels) + 4 * run.tokens * _vocab(run)


def _head_inputs(run: Run, kernels: Kernels) -> int:
    tensors = 3 if kernels.composed and run.model.norm == "rmsnorm" else 2
    return tensors * kernels.element * run.tokens * run.model.hidden // run.layout.sp


def _vocab(run: Run) -> int:
    """This rank's part of the padded vocabulary."""
    tp = run.layout.tp
    return padded_vocab(run.model.vocab, tp, run.model.vocab_multiple) // tp
