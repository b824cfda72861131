"""What one micro-batch leaves behind in one layer for its backward, tensor by tensor.

Units: bytes per GPU.  Below: e bytes an element; t tensor-parallel size; a prime (h') means
divided by t only with sequence parallelism; h hidden size, k width of keys, f FFN width, a heads,
s sequence length.

==================================  =================  ======================================
tensor                              bytes per token    GPT block, bf16, dropout, f = 4h
==================================  =================  ======================================
input of the first norm             e h'               2 h'
input of QKV                        e h'               2 h'
queries; keys and values            e h/t; 2 e k/t     2 h/t; 4 h/t
softmax [, dropout mask and output] e s a/t [(1+e)..]  5 s a/t             (attention "none")
input of the projection             e h/t              2 h/t
dropout mask (with dropout only)    1 h'               1 h'
input of the second norm            e h'               2 h'
input of the FFN                    e h'               2 h'
input of GELU                       e f/t              8 h/t
input of the last FFN matrix        e f/t              8 h/t
dropout mask (with dropout only)    1 h'               1 h'
==================================  =================  ======================================

The right column adds up to h (10' + 24/t) + 5 a s/t: with sequence parallelism
s b h (34 + 5 a s/h)/t, the formula of Korthikanti et al. (2022), which is tested.  Flash attention
and selective recomputation ("recompute") keep no s x s matrix: 34.  ("flash" also keeps 4 bytes a
head and token for the row sums, 0.1 %: left out.)  Full recomputation keeps the layer's input: 2.

LLaMA block.  No dropout, so the masks go and softmax is kept once.  GELU's line becomes SwiGLU's:
the first matrix yields gate and up, 2 f, both needed by the product's backward; the product f is
the input of the last matrix.  Unfused, silu(gate), f more, is kept for the product.  With f = 8/3 h
and k = h, bf16::

    norms, QKV and FFN inputs 8 h',  Q K V 6 h/t,  projection 2 h/t,  SwiGLU 2 (2+1) 8/3 h = 16 h/t
    together 32 (fused) or 32 + 16/3 = 37.3 (unfused)        [+ 2 a s/h without flash or recompute]

and with grouped queries 4 (1 - k/h) less.  Megatron fuses SwiGLU from core_v0.5.0 on.

Mixture of experts: the router's input is the FFN input above; each of the K experts of a token
keeps its permuted input e h (not cut by t), its first output (f, or 2 f gated), the activation
and, before the last matrix, the activation weighted by the router: e f/t each.  Routing is
taken to be even.

Two implementations beside the paper's are known, see ``Kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.runs import Run


@dataclass(frozen=True)
class Kernels:
    """How an implementation stores what the backward needs.

    ``element`` bytes of an activation; ``mask`` bytes of a dropout mask element; ``fused_swiglu``
    keeps no silu(gate); ``fused_rotary`` keeps no second copy of queries and keys beside the QKV
    output; ``fp32_softmax`` keeps the fp32 softmax beside the rounded one; ``fp32_rmsnorm`` makes
    RMSNorm keep its input in fp32 beside the normalised one (both for 2-byte elements only);
    ``composed`` is RMSNorm and SwiGLU made of single operations: the one keeps the normalised input
    beside its input, the other a copy of its up half (Megatron-Core 0.19 adds an offset to it).
    ``layer`` and ``head`` are bytes that a layer and the output layer were measured to keep at the
    run's micro-batch and attention (a profile); they replace the sum of the table above.
    """

    element: int = 2
    mask: int = 1
    fused_swiglu: bool = True
    fused_rotary: bool = True
    fp32_softmax: bool = False
    fp32_rmsnorm: bool = False
    composed: bool = False
    layer: int | None = None
    head: int | None = None


FUSED = Kernels()
"""Fused GPU kernels, bf16: the formula of the literature."""

MEGATRON_2023 = Kernels(fused_swiglu=False)
"""Megatron-LM of the paper's time: SwiGLU in separate kernels (23.06 to core_v0.4.0)."""


def local_kernels(element: int) -> Kernels:
    """Megatron-Core's own PyTorch layers (transformer-impl local, no fusion) on a CPU.

    ``element`` is 4 for fp32 or 2 for bf16.
    """
    return Kernels(
        element=element,
        mask=element,
        fused_swiglu=False,
        fused_rotary=False,
        fp32_softmax=element == 2,
        fp32_rmsnorm=element == 2,
    )


def layer_activations(run: Run, kernels: Kernels = FUSED) -> dict[str, int]:
    """What one micro-batch keeps in one layer, by name, in bytes per GPU."""
    model, t, sp = run.model, run.layout.tp, run.layout.sp
    e, tokens, h = kernels.element, run.tokens, model.hidden
    if run.attention == "full":
        return {"layer input": e * tokens * h // sp}
    kept = {
        "norm inputs": 2 * e * tokens * h // sp,
        "qkv input": e * tokens * h // sp,
        "queries": e * tokens * h // t,
        "keys and values": 2 * e * tokens * model.kv_width // t,
        "projection input": e * tokens * h // t,
        "ffn input": e * tokens * h // sp,
    }
    if run.attention == "none":
        kept["softmax"] = softmax_bytes(run, kernels)
    if model.dropout:
        kept["dropout masks"] = 2 * kernels.mask * tokens * h // sp
    if not kernels.fused_rotary and not model.learned_positions:
        kept["rotated queries and keys"] = e * tokens * (h + model.kv_width) // t
    if kernels.fp32_rmsnorm and model.norm == "rmsnorm":
        kept["norms in fp32"] = 2 * 4 * tokens * h // sp
    if kernels.composed and model.norm == "rmsnorm":
        kept["normalised inputs"] = 2 * e * tokens * h // sp
    visits = model.experts_per_token if model.experts else 1
    widths = 1 + (2 if model.gated else 1)
    if model.gated and not kernels.fused_swiglu:
        widths += 2 if kernels.composed else 1
    if model.experts:
        widths += 1
        kept["expert inputs"] = visits * e * tokens * h
    kept["ffn"] = visits * widths * e * tokens * model.ffn // t
    return kept


def softmax_bytes(run: Run, kernels: Kernels = FUSED) -> int:
    """The s x s matrices of one layer's attention: kept with "none", made anew with "recompute"."""
    model = run.model
    scores = run.tokens * model.seq * model.heads // run.layout.tp
    per_score = kernels.element + (4 if kernels.fp32_softmax else 0)
    if model.dropout:
        per_score += kernels.mask + kernels.element
    return scores * per_score


def micro_batch_bytes(run: Run, stage: int, kernels: Kernels = FUSED) -> int:
    """What one micro-batch keeps on one stage: its layers, and the embedding's dropout on stage 0.

    This is what BPipe moves.  The output layer of the last stage is not in it: its logits live only
    from the end of a forward to the start of its backward.
    """
    layer = kernels.layer or sum(layer_activations(run, kernels).values())
    total = run.layers_of(stage) * layer
    if stage == 0 and run.model.dropout:
        total += kernels.mask * run.tokens * run.model.hidden // run.layout.sp
    return total
