"""B and W of a backward that was measured in one piece: weights' gradients by their FLOPs.

A linear layer's backward is two products as large as its forward, one of them W's.  Attention has
no W: its backward is two products for each of its forward's, in one kernel two and a half, on the
half of the scores that the causal mask leaves.  What is recomputed belongs to B.  Norms, activation
functions and messages, which are not counted, would make W's share smaller.

Units: shares of a backward, seconds.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_bpipe.estimate.models import LayerKind, Model
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.settings import Recompute
from megatron_bpipe.estimate.time.flops import layer_flops
from megatron_bpipe.estimate.time.kernels.attention_time import BACKWARD
from megatron_bpipe.estimate.time.layer_time import Apart, Pace


def apart_of(run: Run, pace: Pace) -> Apart:
    """How this pace's backwards are split: as it knows itself, else by FLOPs."""
    if pace.apart is not None:
        return pace.apart
    dense = None
    if pace.dense is not None:
        dense = _divided(pace.dense[1], weight_share(run, "dense"))
    kind = run.model.kind(run.model.layers - 1)
    layer = _divided(pace.backward, weight_share(run, kind))
    return Apart(layer, _divided(pace.head_backward, 1 / 2), dense)


def weight_share(run: Run, kind: LayerKind) -> float:
    """W's share of one layer's backward, with what is recomputed in it."""
    return _share(run.model, kind, run.one_kernel, run.recomputes)


@lru_cache(maxsize=256)
def _share(model: Model, kind: LayerKind, one_kernel: bool, recompute: Recompute) -> float:
    # of one token, forwards
    scores = 2.0 * model.seen * model.heads * (model.head_width + model.value_width)
    linear = layer_flops(model, 1, kind) / (3 * model.seq) - scores
    scores *= 1 / 2 if one_kernel else 1
    again = 0.0
    if recompute.method:
        again = linear + scores
    elif "core_attn" in recompute.modules:
        again = scores
    return linear / (2 * linear + (BACKWARD if one_kernel else 2) * scores + again)


def _divided(backward: float, weights: float) -> tuple[float, float]:
    return (1 - weights) * backward, weights * backward
