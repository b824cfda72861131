"""How many parameters each GPU of a stage holds.

Tensor parallelism divides the matrices (and the biases of those cut by columns); norms, biases of
those cut by rows, the router and position embeddings are whole on every rank.  Experts are dealt
out over the expert-parallel ranks and cut by t as well.  The word embedding lies on the first
stage; the output layer on the last one, with weights of its own there even when tied (p > 1), as
Megatron keeps a second copy.

Units: parameters per GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.models import Model, padded_vocab
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


def model_parameters(model: Model) -> int:
    """Parameters of the whole model on one GPU, vocabulary not padded."""
    layer = layer_parameters(model, Layout())
    head = 0 if model.tied_embeddings else model.vocab * model.hidden
    positions = model.seq * model.hidden if model.learned_positions else 0
    embedding = model.vocab * model.hidden + positions
    return model.layers * layer.total + embedding + _norm(model) + head


def layer_parameters(model: Model, layout: Layout) -> Parameters:
    """One layer: attention, two norms, and the FFN or the router with this GPU's experts."""
    h, t = model.hidden, layout.tp
    qkv_width = h + 2 * model.kv_width
    attention = h * qkv_width // t + h * h // t
    if model.bias:
        attention += qkv_width // t + h
    dense = attention + 2 * _norm(model)
    if model.experts:
        mine = model.experts // layout.ep
        return Parameters(dense + h * model.experts, mine * _ffn(model, t))
    return Parameters(dense + _ffn(model, t), 0)


def stage_parameters(run: Run, stage: int) -> Parameters:
    """One stage: its layers, the embedding on the first, final norm and output layer on the last.

    ``stage`` counts from 0 to p-1.
    """
    model, layout = run.model, run.layout
    layer = layer_parameters(model, layout)
    dense = run.layers_of(stage) * layer.dense
    words = padded_vocab(model.vocab, layout.tp) // layout.tp * model.hidden
    if stage == 0:
        dense += words + (model.seq * model.hidden if model.learned_positions else 0)
    if stage == layout.pp - 1:
        shared = model.tied_embeddings and layout.pp == 1
        dense += _norm(model) + (0 if shared else words)
    return Parameters(dense, run.layers_of(stage) * layer.experts)


def _ffn(model: Model, t: int) -> int:
    biases = (model.ffn_matrices - 1) * model.ffn // t + model.hidden if model.bias else 0
    return model.ffn_matrices * model.hidden * model.ffn // t + biases


def _norm(model: Model) -> int:
    return model.hidden * (2 if model.norm == "layernorm" else 1)
