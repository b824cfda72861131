"""Floating-point operations of one iteration, and MFU.

Equation 1 (arXiv 2401.02088) is printed as 72 b s l h^2 (1 + s/(6h) + v/(16 l h)).  The head's
matrix multiplication is 2 b s h v forwards and twice that backwards, 6 b s h v in all; divided by
72 b s l h^2 that is v/(12 l h).  v/(16 l h) belongs to the form with 96 b s l h^2 (Narayanan et
al. 2021), which counts the recomputed forward too.  The printed form understates the head by a
quarter: 0.1 % of the whole for the re-evaluation's models.

Units: FLOPs, a multiplication and an addition counted as two.  Attention is counted in full, not
halved for the causal mask, as in the re-evaluation.
"""

from __future__ import annotations

from collections import Counter

from megatron_bpipe.estimate.models import LayerKind, Model


def layer_flops_equation_1(model: Model, sequences: int) -> float:
    """Equation 1 without its head term, for all layers: 72 b s l h^2 (1 + s/(6h))."""
    h, s = model.hidden, model.seq
    return 72 * sequences * s * model.layers * h * h * (1 + s / (6 * h))


def equation_1(model: Model, sequences: int) -> float:
    """FLOPs of forward and backward of so many sequences, as the re-evaluation prints it.

    For its runs only: it takes every FFN for two matrices of 4 h.  What is logged and
    planned counts ``matmul_flops``.
    """
    h, s, v = model.hidden, model.seq, model.vocab
    share = 72 * sequences * s * model.layers * h * h
    return layer_flops_equation_1(model, sequences) + share * v / (16 * model.layers * h)


def equation_1_corrected(model: Model, sequences: int) -> float:
    """The same with the head term v/(12 l h)."""
    return layer_flops_equation_1(model, sequences) + head_flops(model, sequences)


def head_flops(model: Model, sequences: int) -> float:
    """Forward and backward of the output layer: 6 b s h v."""
    return 6.0 * sequences * model.seq * model.hidden * model.vocab


def layer_flops(model: Model, sequences: int, kind: LayerKind | None = None) -> float:
    """Forward and backward of one layer, matrix multiplication by matrix multiplication.

    Per token forwards: QKV 2 h (q + 2 k) with q and k the widths of queries and keys (latent
    attention: its five matrices), scores and context 2 s q each, projection 2 h q, FFN 2 h f for
    each matrix of each expert visited and of a shared one, router 2 h E.  Backwards twice that.
    ``kind`` None is that of the last layer.
    """
    h = model.hidden
    attention = 2 * model.seen * model.heads * (model.head_width + model.value_width)
    attention += 2 * h * model.context_width
    if model.mla:
        mla = model.mla
        attention += 2 * h * (mla.kv_lora + mla.rope)
        attention += 2 * mla.kv_lora * model.heads * (mla.nope + mla.v)
        attention += 2 * (h + model.q_width) * mla.q_lora if mla.q_lora else 2 * h * model.q_width
    else:
        attention += 2 * h * (model.q_width + 2 * model.kv_width)
    ffn, router = model.ffn, 0
    if (kind or model.kind(model.layers - 1)) == "moe":
        ffn = model.expert_width * model.experts_per_token + model.shared_ffn
        router = 2 * h * model.experts
    return 3.0 * sequences * model.seq * (attention + 2 * h * ffn * model.ffn_matrices + router)


def matmul_flops(model: Model, sequences: int) -> float:
    """Forward and backward of all layers and heads, exact for GQA, SwiGLU, experts, prediction."""
    kinds = Counter(model.kind(layer) for layer in range(model.layers))
    layers = sum(n * layer_flops(model, sequences, kind) for kind, n in kinds.items())
    joined = 12.0 * sequences * model.seq * model.hidden**2
    ahead = model.mtp * (layer_flops(model, sequences, model.mtp_kind) + joined)
    return layers + ahead + (1 + model.mtp) * head_flops(model, sequences)


def mfu_percent(flops: float, seconds: float, gpus: int, peak_flops: float) -> float:
    """Model FLOPs utilisation in per cent: what was needed over what the GPUs could have done."""
    return 100 * flops / (seconds * gpus * peak_flops)
