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
keeps its permuted input e h, its first output (f, or 2 f gated), the activation and, where that is
not one kernel with it, the activation weighted by the router: e f each, cut by the experts'
tensor-parallel size; tokens are spread over the tensor-parallel ranks otherwise.  Routing is taken
to be even.  A shared expert keeps what an FFN of its width does.

Latent attention keeps the compressed queries and keys, what is made of them, and queries, keys and
values as any other.

Two implementations beside the re-evaluation's are known, see ``Kernels``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_bpipe.estimate.models import LayerKind
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.settings import Recompute


@dataclass(frozen=True)
class Kernels:
    """How an implementation stores what the backward needs.

    ``element`` bytes of an activation; ``mask`` bytes of a dropout mask element; ``fused_swiglu``
    keeps no silu(gate); ``fused_rotary`` keeps no second copy of queries and keys beside the QKV
    output; ``fp32_softmax`` keeps the fp32 softmax beside the rounded one; ``fp32_rmsnorm`` makes
    RMSNorm keep its input in fp32 beside the normalised one (both for 2-byte elements only);
    ``composed`` is RMSNorm and SwiGLU made of single operations: the one keeps the normalised input
    beside its input, the other a copy of its up half (Megatron-Core 0.19 adds an offset to it).
    ``fused_norm`` computes RMSNorm, and the rotation of queries and keys, in one kernel each.
    ``weighted`` keeps an expert's activation a second time, weighted by the router;
    ``placeholders``: one unused gradient in the weights' format for each shape of weights stays.
    ``fp32_logits`` is how many fp32 tensors of the logits' size live at once in the loss.
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
    fused_norm: bool = True
    weighted: bool = True
    placeholders: bool = False
    fp32_logits: int = 1
    layer: int | None = None
    head: int | None = None


FUSED = Kernels()
"""Fused GPU kernels, bf16: the formula of the literature."""

TRANSFORMER_ENGINE = Kernels(fused_rotary=False, weighted=False, placeholders=True)
"""Megatron-Core from 0.14 on with Transformer Engine.  The rotated queries and keys are new
tensors, and the values are a view of the QKV output, which so stays whole
(megatron/core/transformer/attention.py, get_query_key_value_tensors); the router's weights are
applied inside the activation (megatron/core/fusions/fused_bias_swiglu.py, weighted_*).  With
gradients accumulated inside the matrix product, a placeholder is handed to autograd, kept for each
shape (transformer_engine/pytorch/module/base.py, get_dummy_wgrad)."""

MEGATRON_2023 = Kernels(fused_swiglu=False, fused_norm=False, fp32_logits=2)
"""Megatron-LM of the re-evaluation: SwiGLU, RMSNorm and rotation in separate kernels (23.06 to
core_v0.4.0: megatron/model/rms_norm.py, rotary_pos_embedding.py), the logits'
maximum subtracted into a new tensor (megatron/core/tensor_parallel/cross_entropy.py there)."""


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


_DROPPED: dict[str, tuple[str, ...]] = {
    "core_attn": ("softmax",),
    "layernorm": ("qkv input", "ffn input"),
    "mlp": ("ffn",),
    "moe": ("expert inputs", "experts", "shared expert"),
    "moe_act": ("expert activations",),
    "mla_up_proj": ("queries", "keys and values", "rotated queries and keys"),
    "shared_experts": ("shared expert",),
}
"""What each of --recompute-modules does not keep."""


def layer_activations(
    run: Run, kernels: Kernels = FUSED, kind: LayerKind | None = None
) -> dict[str, int]:
    """What one micro-batch keeps in one layer, by name, in bytes per GPU.

    ``kind`` None is that of the last layer.  Where whole layers are recomputed this is a recomputed
    one.
    """
    model, sp = run.model, run.layout.sp
    kind = kind or model.kind(model.layers - 1)
    recompute = run.recomputes
    if recompute.method:
        every = max(1, recompute.layers) if recompute.method == "uniform" else 1
        return {"layer input": kernels.element * run.tokens * model.hidden // sp // every}
    kept = whole_layer(run, kernels, kind)
    for module in recompute.modules:
        for name in _DROPPED[module]:
            kept.pop(name, None)
    return kept


def whole_layer(run: Run, kernels: Kernels, kind: LayerKind) -> dict[str, int]:
    """What a layer of which nothing is recomputed keeps, by name."""
    model, t, sp = run.model, run.layout.tp, run.layout.sp
    e, tokens, h = kernels.element, run.tokens, model.hidden
    kept = {
        "norm inputs": 2 * e * tokens * h // sp,
        "qkv input": e * tokens * h // sp,
        **_queries_keys_values(run, kernels),
        "projection input": e * tokens * model.context_width // t,
        "ffn input": e * tokens * h // sp,
    }
    if not run.one_kernel:
        kept["softmax"] = softmax_bytes(run, kernels)
    if model.dropout:
        kept["dropout masks"] = 2 * kernels.mask * tokens * h // sp
    if kernels.fp32_rmsnorm and model.norm == "rmsnorm":
        kept["norms in fp32"] = 2 * 4 * tokens * h // sp
    if kernels.composed and model.norm == "rmsnorm":
        kept["normalised inputs"] = 2 * e * tokens * h // sp
    widths = 2 if model.gated else 1
    if model.gated and not kernels.fused_swiglu:
        widths += 2 if kernels.composed else 1
    if kind == "dense":
        kept["ffn"] = (widths + 1) * e * tokens * model.ffn // t
        return kept
    rows = expert_rows(run)
    narrow = model.expert_width // run.layout.expert_tp
    kept["expert inputs"] = e * rows * h
    kept["experts"] = (widths + kernels.weighted) * e * rows * narrow
    kept["expert activations"] = e * rows * narrow
    if model.shared_ffn:
        kept["shared expert"] = (widths + 1) * e * tokens * model.shared_ffn // t
    return kept


def expert_rows(run: Run) -> int:
    """Tokens that one GPU's experts receive of a micro-batch, each as often as it is routed."""
    layout = run.layout
    return run.model.experts_per_token * run.tokens * layout.expert_tp // layout.tp


def _queries_keys_values(run: Run, kernels: Kernels) -> dict[str, int]:
    model, t = run.model, run.layout.tp
    e, tokens = kernels.element, run.tokens
    if model.mla:
        mla = model.mla
        keys = model.q_width + model.heads * mla.v
        return {
            "latents": e * tokens * 2 * (mla.q_lora + mla.kv_lora + mla.rope) // run.layout.sp,
            "queries": e * tokens * model.q_width // t,
            "keys and values": e * tokens * keys // t,
        }
    kept = {
        "queries": e * tokens * model.q_width // t,
        "keys and values": 2 * e * tokens * model.kv_width // t,
    }
    if model.qk_norm:
        kept["norm inputs of queries and keys"] = e * tokens * (model.q_width + model.kv_width) // t
    if not kernels.fused_rotary and not model.learned_positions:
        kept["rotated queries and keys"] = e * tokens * (model.q_width + model.kv_width) // t
    return kept


def softmax_bytes(run: Run, kernels: Kernels = FUSED) -> int:
    """The s x s matrices of one layer's attention: kept with "none", made anew with "recompute"."""
    model = run.model
    scores = run.tokens * model.seq * model.heads // run.layout.tp
    per_score = kernels.element + (4 if kernels.fp32_softmax else 0)
    if model.dropout:
        per_score += kernels.mask + kernels.element
    return scores * per_score


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer of a kind: as it is run, and if nothing of it is recomputed."""

    kept: int
    whole: int


Sizes = Mapping[LayerKind, LayerBytes]


def layer_sizes(run: Run, kernels: Kernels = FUSED) -> Sizes:
    """Every kind of layer that the model has; the same on all stages."""
    found: dict[LayerKind, LayerBytes] = {}
    whole = replace(run, recompute=NOTHING) if run.recomputes.method == "block" else run
    for kind in run.model.kinds:
        kept = kernels.layer or sum(layer_activations(run, kernels, kind).values())
        alone = kept
        if whole is not run:
            alone = kernels.layer or sum(layer_activations(whole, kernels, kind).values())
        found[kind] = LayerBytes(kept, alone)
    return found


def micro_batch_bytes(
    run: Run, stage: int, kernels: Kernels = FUSED, sizes: Sizes | None = None
) -> int:
    """What one micro-batch keeps on one stage: its layers, and the embedding's dropout on stage 0.

    This is what BPipe moves.  The output layer of the last stage is not in it: its logits live only
    from the end of a forward to the start of its backward.  ``sizes`` saves their computation.
    """
    sizes = sizes or layer_sizes(run, kernels)
    total = sum(chunk_bytes(run, stage, chunk, sizes) for chunk in range(run.chunks))
    if run.model.mtp and stage == run.layout.pp - 1:
        both = 2 * kernels.element * run.tokens * run.model.hidden
        total += run.model.mtp * (sizes[run.model.mtp_kind].kept + both)
    if stage == 0 and run.model.dropout:
        total += kernels.mask * run.tokens * run.model.hidden // run.layout.sp
    return total


def chunk_bytes(run: Run, stage: int, chunk: int, sizes: Sizes) -> int:
    """The layers of one chunk of one stage."""
    recompute = run.recomputes
    left = recompute.layers if recompute.method == "block" else run.model.layers
    total = 0
    for kind, number in sorted(run.kinds_of(stage, chunk).items()):
        again = min(number, left)
        left -= again
        total += again * sizes[kind].kept + (number - again) * sizes[kind].whole
    return total


NOTHING = Recompute()
