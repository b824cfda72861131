"""Models: the sizes that FLOPs, memory and time depend on; those of table 2 of the re-evaluation.

Units: sizes in elements; ``seq`` in tokens.

Table 2 gives h, a, s and l.  What it leaves out is assumed here:

* vocabulary: 51200 for GPT-3 (the GPT-2 vocabulary of 50257, padded as in NVIDIA's own papers) and
  32000 for LLaMA (its tokenizer).  It enters equation 1 with a weight of 0.2-0.4 %, and the time of
  the last stage with 2-3 %;
* LLaMA's FFN: 22016, which is 8/3 h rounded up to a multiple of 256, as in the published model.
  The re-evaluation computes with 8/3 h exactly;
* embeddings: tied for GPT-3, untied for LLaMA, Megatron's and LLaMA's habit;
* dropout: on for GPT-3 (the activation formulas of Korthikanti et al. include it), off for LLaMA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_bpipe.estimate.errors import EstimateError

LayerKind = Literal["dense", "moe"]


@dataclass(frozen=True)
class Mla:
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    ``q_lora`` 0: queries straight from the hidden state.  ``nope`` and ``rope`` are the parts of a
    head's query and key without and with rotation, ``v`` the width of its value.
    """

    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True)
class Model:
    """A GPT-like decoder.

    ``ffn`` is the inner width of a dense FFN; ``gated`` means SwiGLU, three matrices instead of
    two; ``kv_heads`` below ``heads`` means grouped-query attention; ``head_dim`` is the width of a
    head, 0 for hidden / heads.  ``experts`` = 0 is a dense model; otherwise the layers that have
    a 1 in ``moe_layers`` (empty: all) are mixtures of that many experts of width ``expert_ffn``
    (0: ``ffn``), of which a token visits ``experts_per_token``, besides a shared expert of width
    ``shared_ffn``.  ``mtp`` layers of multi-token prediction follow the last layer.  ``positions``
    is the length of a learned position table (0: ``seq``), ``window`` the tokens that sliding
    attention sees (0: all) in all layers but every ``full_every``-th.

    Raises EstimateError for sizes that cannot be.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    seq: int
    vocab: int
    ffn: int
    gated: bool
    norm: Literal["layernorm", "rmsnorm"]
    bias: bool
    tied_embeddings: bool
    learned_positions: bool
    dropout: bool
    experts: int = 0
    experts_per_token: int = 1
    head_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    expert_ffn: int = 0
    moe_layers: str = ""
    shared_ffn: int = 0
    shared_gate: bool = False
    mla: Mla | None = None
    mtp: int = 0
    positions: int = 0
    window: int = 0
    full_every: int = 0
    sinks: bool = False
    vocab_multiple: int = field(default=128, compare=False)

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "kv_heads", "layers", "seq", "vocab", "ffn"):
            if getattr(self, name) < 1:
                raise EstimateError(
                    f"{self.name}: {name} is {getattr(self, name)}; give a positive number"
                )
        if self.hidden % self.heads and not self.head_dim and self.mla is None:
            raise EstimateError(
                f"{self.name}: hidden {self.hidden} is not a multiple of {self.heads} heads: "
                "change one of them"
            )
        if self.heads % self.kv_heads:
            raise EstimateError(
                f"{self.name}: {self.heads} heads are not a multiple of {self.kv_heads} key/value "
                "heads: change one of them"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise EstimateError(
                f"{self.name}: a token cannot visit {self.experts_per_token} of {self.experts} "
                "experts: choose 1 to that number"
            )
        if self.moe_layers and (
            len(self.moe_layers) != self.layers or set(self.moe_layers) - {"0", "1"}
        ):
            raise EstimateError(
                f"{self.name}: the MoE layers {self.moe_layers} are {len(self.moe_layers)}: give a "
                f"0 or a 1 for each of {self.layers} layers"
            )

    @property
    def head_width(self) -> int:
        """Width of a head's query."""
        if self.mla:
            return self.mla.nope + self.mla.rope
        return self.head_dim or self.hidden // self.heads

    @property
    def value_width(self) -> int:
        """Width of a head's value."""
        return self.mla.v if self.mla else self.head_width

    @property
    def q_width(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of keys: that of the queries for multi-head attention, less for grouped queries."""
        return self.head_width * self.kv_heads

    @property
    def context_width(self) -> int:
        """Width of what attention yields, the input of the projection."""
        return self.heads * self.value_width

    @property
    def ffn_matrices(self) -> int:
        """Matrices of one FFN: 2, or 3 with SwiGLU."""
        return 3 if self.gated else 2

    @property
    def expert_width(self) -> int:
        """Inner width of one expert."""
        return self.expert_ffn or self.ffn

    def kind(self, layer: int) -> LayerKind:
        """Whether a layer, counted from 0, is a mixture of experts."""
        if not self.experts or (self.moe_layers and self.moe_layers[layer] == "0"):
            return "dense"
        return "moe"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Every kind of layer that there is."""
        if not self.experts:
            return ("dense",)
        return ("dense", "moe") if "0" in self.moe_layers else ("moe",)

    @property
    def mtp_kind(self) -> LayerKind:
        """The kind of the layers of multi-token prediction: that of the last layer."""
        return self.kind(self.layers - 1)

    @property
    def seen(self) -> float:
        """Tokens of a sequence that a query sees if the mask is not used, mean over the layers."""
        if not self.window or self.window >= self.seq:
            return self.seq
        full = 1 / self.full_every if self.full_every else 0.0
        # a causal query sees half the sequence on average, one with a window all of that
        return full * self.seq + (1 - full) * 2 * self.window


def gpt(name: str, *, hidden: int, heads: int, layers: int, seq: int, vocab: int = 51200) -> Model:
    """A GPT-3 block: GELU with 4 h, LayerNorm, biases, learned positions, tied embeddings."""
    return Model(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        layers=layers,
        seq=seq,
        vocab=vocab,
        ffn=4 * hidden,
        gated=False,
        norm="layernorm",
        bias=True,
        tied_embeddings=True,
        learned_positions=True,
        dropout=True,
    )


def llama(
    name: str,
    *,
    hidden: int,
    heads: int,
    layers: int,
    seq: int,
    vocab: int = 32000,
    kv_heads: int | None = None,
    ffn: int | None = None,
) -> Model:
    """A LLaMA block: SwiGLU, RMSNorm, rotary positions, no bias, no dropout, untied embeddings.

    ``ffn`` defaults to ``swiglu_ffn(hidden)``, ``kv_heads`` to ``heads``.
    """
    return Model(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        layers=layers,
        seq=seq,
        vocab=vocab,
        ffn=swiglu_ffn(hidden) if ffn is None else ffn,
        gated=True,
        norm="rmsnorm",
        bias=False,
        tied_embeddings=False,
        learned_positions=False,
        dropout=False,
    )


def swiglu_ffn(hidden: int, multiple: int = 256) -> int:
    """Width 8/3 h of a SwiGLU FFN, rounded up to a multiple (1: to the next integer)."""
    exact = -(-8 * hidden // 3)
    return -(-exact // multiple) * multiple


def padded_vocab(vocab: int, tp: int, multiple: int = 128) -> int:
    """The vocabulary Megatron really builds: padded to a multiple of 128 t.

    Source: --make-vocab-size-divisible-by, default 128, times the tensor-parallel size.
    """
    step = multiple * tp
    return -(-vocab // step) * step


TABLE_2 = {
    "LLaMA 65B": llama("LLaMA 65B", hidden=8192, heads=64, layers=80, seq=2048),
    "GPT-3 96B": gpt("GPT-3 96B", hidden=9984, heads=104, layers=80, seq=2048),
}
"""The re-evaluation's table 2 by name; the module's docstring says what is assumed."""


def model_named(name: str) -> Model:
    """A model of table 2; raises EstimateError naming those that exist."""
    if name not in TABLE_2:
        raise EstimateError(f"model {name!r} is not known: use {' or '.join(map(repr, TABLE_2))}")
    return TABLE_2[name]
