"""What one micro-batch keeps between B and W, where a schedule splits the backward.

Every linear layer keeps its input and the gradient of its output until W.  Notation as in
`activations`; with sequence parallelism an input is kept as the local shard, while the gradient of
what a row-parallel layer puts out is whole on every rank::

    QKV             e h'     and  e (h + 2 k)/t
    projection      e h/t    and  e h
    first FFN       e h'     and  e f/t   (gated: 2 f)
    last FFN        e f/t    and  e h

A GPT block with t = 1 and f = 4 h keeps 7 h of inputs and 9 h of gradients a token: 16 e s b h,
which is what runs were measured to keep (tests/training/schedules/test_zero_bubble.py).
Recomputation changes nothing here: B makes the inputs anew and leaves them.

Units: bytes per GPU.
"""

from __future__ import annotations

from megatron_bpipe.estimate.memory.activations import FUSED, Kernels, expert_rows
from megatron_bpipe.estimate.models import LayerKind, padded_vocab
from megatron_bpipe.estimate.runs import Run


def left_by_layer(run: Run, kind: LayerKind, kernels: Kernels = FUSED) -> int:
    """Of one micro-batch in one layer; latent attention is taken as any other of its widths."""
    model, t, sp, tokens = run.model, run.layout.tp, run.layout.sp, run.tokens
    h, outputs = model.hidden, 2 if model.gated else 1
    context = model.context_width // t
    attention = h // sp + (model.q_width + 2 * model.kv_width) // t + context + h
    if kind == "dense":
        width = model.ffn // t
        return kernels.element * tokens * (attention + h // sp + (outputs + 1) * width + h)
    elements = tokens * attention
    narrow = model.expert_width // run.layout.expert_tp
    elements += expert_rows(run) * (2 * h + (outputs + 1) * narrow)
    if model.shared_ffn:
        elements += tokens * (h // sp + (outputs + 1) * model.shared_ffn // t + h)
    return kernels.element * elements


def left_for_weight(
    run: Run, stage: int, head: bool, kernels: Kernels = FUSED, chunk: int | None = None
) -> int:
    """Of one micro-batch on one stage, or one chunk of it; ``head``: with the output layer."""
    total = 0
    for kind, number in run.kinds_of(stage, chunk).items():
        total += number * left_by_layer(run, kind, kernels)
    if head:
        model, t = run.model, run.layout.tp
        padded = padded_vocab(model.vocab, t, model.vocab_multiple)
        width = model.hidden // run.layout.sp + padded // t
        total += kernels.element * run.tokens * width
    return total
