"""Seconds of attention itself, between QKV and projection, forwards and backwards.

Flash attention runs at the GPU's measured rate (``Gpu.attention``) on the half of the scores that
the causal mask leaves, two and a half times as many operations backwards; the last tile of
queries, which sees all keys, keeps one multiprocessor busy alone.  Without one kernel both products
run as any product does, on all scores, and s x s matrices move through memory, many more of them
where the fused softmax cannot run (``fused_softmax_rules``).

Units: seconds, bytes.
"""

from __future__ import annotations

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.activations import Kernels
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.kernels.fused_softmax_rules import why_not_fused
from megatron_bpipe.estimate.time.kernels.matrix_products import KERNEL, product_seconds

TILE = 128
"""Queries of one tile of flash attention."""
BACKWARD = 2.5
"""Five products backwards, two forwards."""
FLASH_2 = (355e12, 290e12)
"""FLOP/s forwards and backwards of FlashAttention-2 on an H100, causal, heads of 128, 8192 tokens
(arXiv 2407.08608, figures 5 and 6).  It computes with Ampere's instructions, and so on newer GPUs
too; it is what Transformer Engine falls back to from cuDNN's kernels with dropout or deterministic
gradients (transformer_engine/pytorch/attention/dot_product_attention/utils.py)."""
DROPOUT = 0.75
"""Rate with random numbers drawn inside the kernel: hiding them makes a whole block 1.14 times as
fast, of which attention is two fifths (arXiv 2410.07531)."""
DETERMINISTIC = 0.8
"""Rate of a backward without atomic additions (FlashAttention 2.4's notes: 10 to 20 % slower)."""


def attention_seconds(run: Run, gpu: Gpu, kernels: Kernels) -> tuple[float, float]:
    """One layer's attention of one micro-batch, without recomputation."""
    if not run.one_kernel:
        return _unfused(run, gpu, kernels)
    model, t = run.model, run.layout.tp
    widths = model.heads // t * (model.head_width + model.value_width)
    scores = run.tokens * model.seen / 2  # under the mask
    flops = 2.0 * scores * widths
    forward, backward = (gpu.flops * share for share in gpu.attention)
    if run.settings.deterministic or model.dropout:
        forward, backward = min(forward, FLASH_2[0]), min(backward, FLASH_2[1])
    if model.dropout:
        forward, backward = DROPOUT * forward, DROPOUT * backward
    if run.settings.deterministic:
        backward *= DETERMINISTIC
    row = 2.0 * TILE * model.seen * (model.head_width + model.value_width) * gpu.sms
    return (
        (flops + row) / forward + KERNEL,
        BACKWARD * (flops + row) / backward + KERNEL,
    )


def _unfused(run: Run, gpu: Gpu, kernels: Kernels) -> tuple[float, float]:
    model, layout = run.model, run.layout
    heads = run.micro_batch * model.heads // layout.tp
    queries, keys = model.seq // layout.cp, model.seq
    first = (queries, keys, model.head_width)
    second = (queries, model.value_width, keys)
    products = [product_seconds(gpu, *shape, kernels.element, heads) for shape in (first, second)]
    bandwidth = gpu.memory_bandwidth * gpu.memory_share
    scores = heads * queries * keys / bandwidth
    there, back = _score_bytes(run, kernels)
    return sum(products) + there * scores, 2 * sum(products) + back * scores


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
