"""How many parameters each GPU of a stage holds.

Tensor parallelism divides the matrices (and the biases of those cut by columns); norms, biases of
those cut by rows, the router, latent down-projections and position embeddings are whole on every
rank.  Experts are dealt out over the expert-parallel ranks and cut by the expert-tensor-parallel
size.  The word embedding lies on the first stage; the output layer on the last one, with weights of
its own there even when tied (p > 1), as Megatron keeps a second copy.  Multi-token prediction adds
layers, each with a projection of 2h and three norms, to the last stage, and a copy of the word
embedding where that is not the first.

Units: parameters per GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_bpipe.estimate.models import LayerKind, Model, padded_vocab
from megatron_bpipe.estimate.runs import Layout, Run


@dataclass(frozen=True)
class Parameters:
    """Parameters of one GPU; experts apart, as their optimizer state is shared by fewer ranks."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.dense + self.experts

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)

    def times(self, number: int) -> Parameters:
        """That many of them."""
        return Parameters(number * self.dense, number * self.experts)


def model_parameters(model: Model) -> int:
    """Parameters of the whole model on one GPU, vocabulary not padded."""
    one = Layout()
    layers = sum(layer_parameters(model, one, model.kind(i)).total for i in range(model.layers))
    head = 0 if model.tied_embeddings else model.vocab * model.hidden
    embedding = model.vocab * model.hidden + _positions(model)
    return layers + embedding + _norm(model) + head + mtp_parameters(model, one).total


@lru_cache(maxsize=4096)
def layer_parameters(model: Model, layout: Layout, kind: LayerKind | None = None) -> Parameters:
    """One layer: attention, two norms, and the FFN or the router with this GPU's experts.

    ``kind`` None is that of the last layer.
    """
    dense = _attention(model, layout.tp) + 2 * _norm(model)
    if (kind or model.kind(model.layers - 1)) == "dense":
        return Parameters(dense + _ffn(model, model.ffn, layout.tp), 0)
    dense += model.hidden * model.experts  # the router
    if model.shared_ffn:
        dense += _ffn(model, model.shared_ffn, layout.tp)
        dense += model.hidden if model.shared_gate else 0
    mine = model.experts // layout.ep
    return Parameters(dense, mine * _ffn(model, model.expert_width, layout.expert_tp))


def matrix_shapes(model: Model, layout: Layout, kind: LayerKind) -> set[tuple[int, int]]:
    """Rows and columns of the linear layers of one layer on one GPU, each once; experts' too."""
    h, t = model.hidden, layout.tp
    shapes = {(h, model.context_width // t)}
    if model.mla:
        mla = model.mla
        shapes |= {(mla.kv_lora + mla.rope, h)}
        shapes |= {(model.heads // t * (mla.nope + mla.v), mla.kv_lora)}
        shapes |= {(model.q_width // t, mla.q_lora or h)}
        shapes |= {(mla.q_lora, h)} if mla.q_lora else set()
    else:
        shapes |= {((model.q_width + 2 * model.kv_width) // t, h)}
    widths = {model.ffn // t} if kind == "dense" else {model.expert_width // layout.expert_tp}
    if kind == "moe" and model.shared_ffn:
        widths |= {model.shared_ffn // t}
    for width in widths:
        shapes |= {((model.ffn_matrices - 1) * width, h), (h, width)}
    return shapes


def mtp_parameters(model: Model, layout: Layout) -> Parameters:
    """Multi-token prediction: a layer, its projection (cut by columns) and its norms, each time."""
    each = layer_parameters(model, layout, model.mtp_kind)
    around = 2 * model.hidden * model.hidden // layout.tp + 3 * _norm(model)
    return (each + Parameters(around, 0)).times(model.mtp)


def stage_parameters(run: Run, stage: int) -> Parameters:
    """One stage: its layers, the embedding on the first, norm and output layer on the head's.

    That is the last one, under the V placement the first; it has a copy of tied embeddings of its
    own there too.  ``stage`` counts from 0 to p-1.
    """
    model, layout = run.model, run.layout
    found = Parameters(0, 0)
    for kind, number in run.kinds_of(stage).items():
        found += layer_parameters(model, layout, kind).times(number)
    vocab = padded_vocab(model.vocab, layout.tp, model.vocab_multiple)
    words = vocab // layout.tp * model.hidden
    last = stage == run.head_stage
    dense = 0
    if stage == 0:
        dense += words + _positions(model)
    if last:
        shared = model.tied_embeddings and layout.pp == 1
        dense += _norm(model) + (0 if shared else words)
        if model.mtp:
            found += mtp_parameters(model, layout)
            dense += words if stage and not model.tied_embeddings else 0
    return found + Parameters(dense, 0)


def _attention(model: Model, t: int) -> int:
    h = model.hidden
    if model.mla:
        return _latent_attention(model, t)
    qkv_width = model.q_width + 2 * model.kv_width
    found = h * qkv_width // t + model.context_width * h // t
    if model.bias:
        found += qkv_width // t + h
    elif model.qkv_bias:
        found += qkv_width // t
    norms = 2 if model.norm == "layernorm" else 1
    found += 2 * norms * model.head_width if model.qk_norm else 0
    return found + (model.heads // t if model.sinks else 0)


def _latent_attention(model: Model, t: int) -> int:
    mla, h, norms = model.mla, model.hidden, 2 if model.norm == "layernorm" else 1
    assert mla is not None
    found = h * (mla.kv_lora + mla.rope)
    found += mla.kv_lora * model.heads * (mla.nope + mla.v) // t
    found += model.context_width * h // t + (h if model.bias else 0)
    latent = mla.kv_lora
    if mla.q_lora:
        found += h * mla.q_lora + mla.q_lora * model.q_width // t
        latent += mla.q_lora
    else:
        found += h * model.q_width // t
    return found + (norms * latent if model.qk_norm else 0)


def _ffn(model: Model, width: int, t: int) -> int:
    biases = (model.ffn_matrices - 1) * width // t + model.hidden if model.bias else 0
    return model.ffn_matrices * model.hidden * width // t + biases


def _positions(model: Model) -> int:
    return (model.positions or model.seq) * model.hidden if model.learned_positions else 0


def _norm(model: Model) -> int:
    return model.hidden * (2 if model.norm == "layernorm" else 1)
