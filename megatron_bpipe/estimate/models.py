"""Models: the sizes that FLOPs and memory depend on, and those of the paper's table 2.

Units: sizes in elements; ``seq`` in tokens.

Table 2 gives h, a, s and l.  What it leaves out is assumed here:

* vocabulary: 51200 for GPT-3 (the GPT-2 vocabulary of 50257, padded as in NVIDIA's own papers) and
  32000 for LLaMA (its tokenizer).  It enters equation 1 with a weight of 0.2-0.4 %, and the time of
  the last stage with 2-3 %;
* LLaMA's FFN: 22016, which is 8/3 h rounded up to a multiple of 256, as in the published model.
  The paper computes with 8/3 h exactly;
* embeddings: tied for GPT-3, untied for LLaMA, Megatron's and LLaMA's habit;
* dropout: on for GPT-3 (the activation formulas of Korthikanti et al. include it), off for LLaMA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bpipe.estimate.errors import EstimateError


@dataclass(frozen=True)
class Model:
    """A GPT-like decoder.

    ``ffn`` is the inner width of the FFN (of one expert in a mixture of experts); ``gated`` means
    SwiGLU, three matrices instead of two; ``kv_heads`` below ``heads`` means grouped-query
    attention.  ``experts`` = 0 is a dense model; otherwise every layer has that many experts, of
    which a token visits ``experts_per_token``.  Raises EstimateError for sizes that cannot be.
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

    def __post_init__(self) -> None:
        for field in ("hidden", "heads", "kv_heads", "layers", "seq", "vocab", "ffn"):
            if getattr(self, field) < 1:
                raise EstimateError(
                    f"{self.name}: {field} is {getattr(self, field)}; give a positive number"
                )
        if self.hidden % self.heads:
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

    @property
    def kv_width(self) -> int:
        """Width of keys (and of values): h for multi-head attention, less for grouped queries."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def ffn_matrices(self) -> int:
        """Matrices of one FFN: 2, or 3 with SwiGLU."""
        return 3 if self.gated else 2


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
"""The paper's table 2 by name; the module's docstring says what is assumed."""


def model_named(name: str) -> Model:
    """A model of table 2; raises EstimateError naming those that exist."""
    if name not in TABLE_2:
        raise EstimateError(f"model {name!r} is not known: use {' or '.join(map(repr, TABLE_2))}")
    return TABLE_2[name]
