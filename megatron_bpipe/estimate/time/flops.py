"""Floating-point operations of one iteration, and MFU.

Equation 1 of the paper is printed as 72 b s l h^2 (1 + s/(6h) + v/(16 l h)).  The head's matrix
multiplication is 2 b s h v forwards and twice that backwards, 6 b s h v in all; divided by
72 b s l h^2 that is v/(12 l h).  v/(16 l h) belongs to the form with 96 b s l h^2 (Narayanan et
al. 2021), which counts the recomputed forward too.  The printed form understates the head by a
quarter: 0.1 % of the whole for the paper's models.

Units: FLOPs, a multiplication and an addition counted as two.  Attention is counted in full, not
halved for the causal mask, as in the paper.
"""

from __future__ import annotations

from megatron_bpipe.estimate.models import Model


def layer_flops_equation_1(model: Model, sequences: int) -> float:
    """Equation 1 without its head term, for all layers: 72 b s l h^2 (1 + s/(6h))."""
    h, s = model.hidden, model.seq
    return 72 * sequences * s * model.layers * h * h * (1 + s / (6 * h))


def equation_1(model: Model, sequences: int) -> float:
    """FLOPs of forward and backward of so many sequences, as the paper prints it."""
    h, s, v = model.hidden, model.seq, model.vocab
    share = 72 * sequences * s * model.layers * h * h
    return layer_flops_equation_1(model, sequences) + share * v / (16 * model.layers * h)


def equation_1_corrected(model: Model, sequences: int) -> float:
    """The same with the head term v/(12 l h)."""
    return layer_flops_equation_1(model, sequences) + head_flops(model, sequences)


def head_flops(model: Model, sequences: int) -> float:
    """Forward and backward of the output layer: 6 b s h v."""
    return 6.0 * sequences * model.seq * model.hidden * model.vocab


def layer_flops(model: Model, sequences: int) -> float:
    """Forward and backward of one layer, matrix multiplication by matrix multiplication.

    Per token forwards: QKV 2 h (h + 2 k) with k the width of keys, scores and context 2 s h each,
    projection 2 h^2, FFN 2 h f for each matrix of each expert visited, router 2 h E.  Backwards
    twice that.
    """
    h, f, experts = model.hidden, model.ffn, model.experts
    attention = 2 * h * (h + 2 * model.kv_width) + 2 * 2 * model.seq * h + 2 * h * h
    ffn = 2 * h * f * model.ffn_matrices * (model.experts_per_token if experts else 1)
    router = 2 * h * experts
    return 3.0 * sequences * model.seq * (attention + ffn + router)


def matmul_flops(model: Model, sequences: int) -> float:
    """Forward and backward of all layers and the head, exact for GQA, SwiGLU and experts."""
    return model.layers * layer_flops(model, sequences) + head_flops(model, sequences)


def mfu_percent(flops: float, seconds: float, gpus: int, peak_flops: float) -> float:
    """Model FLOPs utilisation in per cent: what was needed over what the GPUs could have done."""
    return 100 * flops / (seconds * gpus * peak_flops)
