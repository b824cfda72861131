"""A model from a Hugging Face ``config.json``.

What a config calls its sizes depends on ``model_type`` (``hf_families``).  Every field that changes
the model is read here, becomes a flag (``hf_flags``), or is refused by name; those that nobody here
knows are listed in a note.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Mla, Model
from megatron_bpipe.planner.inputs.hf_families import FAMILIES, HYBRID, OTHER, SILENT, Family
from megatron_bpipe.planner.inputs.hf_fields import Fields
from megatron_bpipe.planner.inputs.hf_flags import extra_flags, refuse_unless


@dataclass(frozen=True)
class Config:
    """The model, flags of Megatron that its sizes do not say, and lines to show."""

    model: Model
    extra_flags: tuple[str, ...]
    notes: tuple[str, ...] = ()


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
    fields = Fields(path, data)
    kind = fields.text("model_type")
    if kind == "gpt2":
        model, flags = _gpt2(fields, seq), _gpt2_flags(fields)
    elif kind in FAMILIES:
        family = FAMILIES[kind]
        model, flags = _decoder(fields, kind, family, seq), extra_flags(fields, family)
    else:
        raise EstimateError(_refusal(path, kind))
    unread = sorted(set(data) - fields.read - SILENT)
    notes = (f"not read from {path.name}: {', '.join(unread)}",) if unread else ()
    return Config(model, tuple(flags), notes)


def _refusal(path: Path, kind: str) -> str:
    if kind in HYBRID:
        return (
            f"{path}: model_type is {kind!r}, with {HYBRID[kind]}: hybrid layers are not known to "
            "the planner; measure a run with --bpipe-report DIR and use plan --from-report DIR"
        )
    if kind in OTHER:
        return (
            f"{path}: model_type is {kind!r}, with {OTHER[kind]}, which is not known here; for its "
            "parallel sizes plan a llama config of the same sizes"
        )
    return (
        f"{path}: model_type is {kind!r}: known are {', '.join(FAMILIES)} and gpt2; for a decoder "
        "with one of these blocks set model_type to it"
    )


def _decoder(fields: Fields, kind: str, family: Family, seq: int | None) -> Model:
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    layers, longest = fields.number("num_hidden_layers"), fields.number("max_position_embeddings")
    experts = fields.number(family.experts) if family.experts else 0
    attention_bias, mlp_bias = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
    everywhere = family.attention_bias == "all" or (attention_bias and mlp_bias)
    if mlp_bias and not everywhere:
        raise fields.refuse("mlp_bias", "Megatron has biases in all linear layers or in none")
    if attention_bias and not everywhere and family.attention_bias == "both":
        raise fields.refuse("attention_bias", "Megatron has no bias of the projection alone")
    ffn = fields.number("intermediate_size")
    window, every = _window(fields, seq or longest)
    head_dim = None if family.latent else fields.maybe_number("head_dim")
    if family.latent:
        fields.get("head_dim")
    return Model(
        name=fields.path.parent.name or kind,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if family.latent else fields.number("num_key_value_heads", default=heads),
        layers=layers,
        seq=seq or longest,
        vocab=fields.number("vocab_size"),
        ffn=ffn,
        gated=True,
        norm="rmsnorm",
        bias=everywhere,
        tied_embeddings=fields.flag("tie_word_embeddings", family.tied),
        learned_positions=False,
        dropout=bool(fields.maybe_float("attention_dropout")),
        experts=experts,
        experts_per_token=fields.number("num_experts_per_tok", default=2) if experts else 1,
        head_dim=head_dim if head_dim and head_dim * heads != hidden else 0,
        qkv_bias=family.qkv_bias or (attention_bias and family.attention_bias == "qkv"),
        qk_norm=family.qk_norm or family.latent or fields.flag("use_qk_norm", False),
        expert_ffn=_expert_width(fields, ffn) if experts else 0,
        moe_layers=_moe_layers(fields, layers) if experts else "",
        shared_ffn=_shared(fields) if experts else 0,
        shared_gate=kind == "qwen2_moe",
        mla=_latent(fields) if family.latent else None,
        mtp=fields.maybe_number("num_nextn_predict_layers") or 0,
        window=window,
        full_every=every,
        sinks=kind == "gpt_oss",
    )


def _latent(fields: Fields) -> Mla:
    fields.get("num_key_value_heads")  # as many as heads
    return Mla(
        q_lora=fields.maybe_number("q_lora_rank") or 0,
        kv_lora=fields.number("kv_lora_rank"),
        nope=fields.number("qk_nope_head_dim"),
        rope=fields.number("qk_rope_head_dim"),
        v=fields.number("v_head_dim"),
    )


def _expert_width(fields: Fields, ffn: int) -> int:
    width = fields.maybe_number("moe_intermediate_size") or ffn
    return 0 if width == ffn else width


def _shared(fields: Fields) -> int:
    """Width of what all tokens visit."""
    own = fields.maybe_number("shared_expert_intermediate_size")
    if own:
        return own
    number = fields.maybe_number("n_shared_experts") or 0
    return number * fields.number("moe_intermediate_size") if number else 0


def _moe_layers(fields: Fields, layers: int) -> str:
    """Dense first layers, every so many-th a mixture, and dense ones by number."""
    dense = fields.get("first_k_dense_replace") or 0
    step = fields.maybe_number("moe_layer_freq") or fields.maybe_number("decoder_sparse_step") or 1
    alone = set(fields.get("mlp_only_layers") or ())
    by_step = "decoder_sparse_step" in fields.data
    pattern = ""
    for i in range(layers):
        turn = (i + 1) % step == 0 if by_step else i % step == 0
        pattern += "1" if i >= dense and turn and i not in alone else "0"
    return "" if "0" not in pattern else pattern


def _window(fields: Fields, seq: int) -> tuple[int, int]:
    """Tokens of sliding attention besides the query, 0 for all, and how often attention is full."""
    width, used = fields.maybe_number("sliding_window"), fields.flag("use_sliding_window", True)
    kinds = fields.get("layer_types")
    if not width or not used or width >= seq:
        return 0, 0
    if not kinds:
        return width - 1, 0
    full = [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if len(full) == len(kinds):
        return 0, 0
    every = full[0] if full else 0
    if full != [i for i in range(1, len(kinds) + 1) if every and i % every == 0]:
        raise fields.refuse("layer_types", "Megatron has full attention in every n-th layer")
    return width - 1, every


def _gpt2(fields: Fields, seq: int | None) -> Model:
    hidden, heads = fields.number("n_embd"), fields.number("n_head")
    positions = fields.number("n_positions")
    if seq is not None and seq > positions:
        raise fields.refuse(
            "n_positions", f"a sequence of {seq} tokens needs as long a position table"
        )
    return Model(
        name=fields.path.parent.name or "gpt2",
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        layers=fields.number("n_layer"),
        seq=seq or positions,
        vocab=fields.number("vocab_size"),
        ffn=fields.number("n_inner", default=4 * hidden),
        gated=False,
        norm="layernorm",
        bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        learned_positions=True,
        dropout=any(fields.maybe_float(name) for name in ("attn_pdrop", "resid_pdrop")),
        positions=positions if seq not in (None, positions) else 0,
    )


def _gpt2_flags(fields: Fields) -> list[str]:
    activation = fields.maybe_text("activation_function")
    if activation not in (None, "gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise fields.refuse("activation_function", "Megatron's block has GELU")
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        fields.get(name)
        refuse_unless(fields, name, False)
    fields.get("scale_attn_weights")
    refuse_unless(fields, "scale_attn_weights", True)
    flags: list[str] = []
    epsilon = fields.maybe_float("layer_norm_epsilon")
    if epsilon is not None:
        flags += ["--norm-epsilon", f"{epsilon:g}"]
    rates = {"attn_pdrop": "--attention-dropout", "resid_pdrop": "--hidden-dropout"}
    if any(fields.maybe_float(name) for name in rates):
        for name, flag in rates.items():
            flags += [flag, f"{fields.maybe_float(name) or 0.0:g}"]
    return flags
