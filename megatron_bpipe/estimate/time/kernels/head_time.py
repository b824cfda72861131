"""Seconds of the output layer with its loss, and of the word embedding's gradient.

Units: seconds, bytes.
"""

from __future__ import annotations

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.activations import Kernels
from megatron_bpipe.estimate.models import padded_vocab
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.kernels.collectives import gather_seconds
from megatron_bpipe.estimate.time.kernels.matrix_products import Product, forward_backward

LOSS_FORWARD, LOSS_BACKWARD = 38, 14
"""Memory traffic per logit of Megatron's cross entropy: to fp32 (6), max (4), subtract (8), exp
(8), sum (4), divide (8), and backwards scale (8) and to bf16 (6).  Read in
megatron/core/tensor_parallel/cross_entropy.py, core_v0.4.0 to 0.19.0."""
FUSED_LOSS_FORWARD, FUSED_LOSS_BACKWARD = 6, 4
"""In one kernel: logits read twice, their gradient written in place; scaled backwards."""


def head_seconds(run: Run, gpu: Gpu, kernels: Kernels) -> tuple[float, float, float, float]:
    """Forward and backward of final norm, output layer and loss of one micro-batch.

    Then the backward split in two, B and W: what ran beside the product of the weights is exposed
    in B, and W gathers its input again.
    """
    model, layout, e = run.model, run.layout, kernels.element
    bandwidth = gpu.memory_bandwidth * gpu.memory_share
    vocab = padded_vocab(model.vocab, layout.tp, model.vocab_multiple) // layout.tp
    product = Product(run.tokens, vocab, model.hidden)
    there, inputs, weights = forward_backward(gpu, product, e, fused=run.settings.grad_fusion)
    logits = run.tokens * vocab / bandwidth
    loss = (LOSS_FORWARD, LOSS_BACKWARD)
    if run.settings.loss_fusion:
        loss = (FUSED_LOSS_FORWARD, FUSED_LOSS_BACKWARD)
    line = e * run.tokens * model.hidden / layout.sp / bandwidth
    message = 0.0
    if layout.sequence_parallel:
        message = gather_seconds(gpu, layout.tp, e * run.tokens * model.hidden)
    heads = 1 + model.mtp
    rest = loss[1] * logits + 3 * line
    return (
        heads * (there + loss[0] * logits + 2 * line + message),
        heads * (inputs + max(weights, message) + rest),
        heads * (inputs + message + rest),
        heads * (weights + message),
    )


def embedding_seconds(run: Run, gpu: Gpu, kernels: Kernels) -> float:
    """Gradient of the word embedding: a dense tensor, written and added to the fp32 gradients."""
    model, t = run.model, run.layout.tp
    elements = padded_vocab(model.vocab, t, model.vocab_multiple) // t * model.hidden
    return (2 * kernels.element + 8) * elements / (gpu.memory_bandwidth * gpu.memory_share)
