"""A model from a Hugging Face ``config.json``.

What a config calls its sizes depends on ``model_type``; those known here are dense decoders with
LLaMA's block, mixtures of experts with it (Mixtral), and GPT-2.  Others are refused by name rather
than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model

LLAMA_LIKE = {
    "llama": (),
    "mistral": (),
    "mixtral": (),
    "qwen2": ("--add-qkv-bias",),
    "qwen3": ("--qk-layernorm",),
}
"""Model types with LLaMA's block, and the flags of Megatron that ``Model`` has no field for."""


@dataclass(frozen=True)
class Config:
    """The model, and flags of Megatron that its sizes do not say."""

    model: Model
    extra_flags: tuple[str, ...]


def read_config(path: Path, seq: int | None) -> Config:
    """What a config says; ``seq`` replaces the longest sequence that it names.

    Raises EstimateError naming the file and the field that is missing or that has no counterpart.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EstimateError(f"{path}: {error.strerror}; give a config.json") from error
    except ValueError as error:
        raise EstimateError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise EstimateError(f"{path} is no config: an object with model_type is expected")
    fields = _Fields(path, data)
    kind = fields.text("model_type")
    if kind in LLAMA_LIKE:
        extra = list(LLAMA_LIKE[kind])
        if "rope_theta" in data:
            extra += ["--rotary-base", f"{float(data['rope_theta']):.0f}"]
        return Config(_llama(fields, kind, seq), tuple(extra))
    if kind == "gpt2":
        return Config(_gpt2(fields, seq), ())
    raise EstimateError(
        f"{path}: model_type is {kind!r}: known are {', '.join(LLAMA_LIKE)} and gpt2; give "
        "Megatron's flags instead"
    )


class _Fields:
    """The config's fields, each checked when it is asked for."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str):
            raise EstimateError(f"{self.path}: {name} is {value!r}: it must name the model's kind")
        return value

    def number(self, name: str, default: int | None = None) -> int:
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise EstimateError(f"{self.path}: {name} is missing: add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EstimateError(f"{self.path}: {name} is {value!r}: give a positive number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.data.get(name, default))

    def share(self, *names: str) -> bool:
        """Whether any of these dropout rates is above 0."""
        return any(float(self.data.get(name) or 0) > 0 for name in names)


def _llama(fields: _Fields, kind: str, seq: int | None) -> Model:
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    head_dim = fields.data.get("head_dim")
    if head_dim is not None and head_dim * heads != hidden:
        raise EstimateError(
            f"{fields.path}: head_dim is {head_dim}, not hidden_size / num_attention_heads = "
            f"{hidden / heads:g}: such models are not known here"
        )
    experts = fields.number("num_local_experts") if kind == "mixtral" else 0
    return Model(
        name=fields.path.parent.name or kind,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.number("num_key_value_heads", default=heads),
        layers=fields.number("num_hidden_layers"),
        seq=seq or fields.number("max_position_embeddings"),
        vocab=fields.number("vocab_size"),
        ffn=fields.number("intermediate_size"),
        gated=True,
        norm="rmsnorm",
        bias=False,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        learned_positions=False,
        dropout=fields.share("attention_dropout"),
        experts=experts,
        experts_per_token=fields.number("num_experts_per_tok", default=2) if experts else 1,
    )


def _gpt2(fields: _Fields, seq: int | None) -> Model:
    hidden, heads = fields.number("n_embd"), fields.number("n_head")
    return Model(
        name=fields.path.parent.name or "gpt2",
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        layers=fields.number("n_layer"),
        seq=seq or fields.number("n_positions"),
        vocab=fields.number("vocab_size"),
        ffn=fields.number("n_inner", default=4 * hidden),
        gated=False,
        norm="layernorm",
        bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        learned_positions=True,
        dropout=fields.share("attn_pdrop", "resid_pdrop"),
    )
