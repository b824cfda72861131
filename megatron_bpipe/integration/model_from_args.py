"""Megatron's parsed arguments as the estimator's model."""

from __future__ import annotations

from typing import Any

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.planner.inputs.given_model import latent_attention, moe_layers, table_length

UNKNOWN = (
    *("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"),
    *("experimental_attention_variant", "heterogeneous_layers_config_path"),
)
"""Layers that the estimator does not know; not every release has each of these."""


def model_of(args: Any) -> Model | None:
    """The model that is trained; None for one whose FLOPs the estimator does not know."""
    if any(getattr(args, name, None) for name in UNKNOWN):
        return None
    try:
        return model_from(args, "the model", args.padded_vocab_size)
    except EstimateError:
        return None


def model_from(args: Any, name: str, vocab: int) -> Model:
    """The same Model that `planner.inputs.given_model` makes of the flags themselves.

    ``vocab`` counts words with or without padding, as the caller needs it. ``dropout`` is on if
    either kind is. Raises EstimateError where the sizes cannot be.
    """
    hidden, heads = args.hidden_size, args.num_attention_heads
    experts = getattr(args, "num_experts", None) or 0
    grouped = getattr(args, "group_query_attention", False)
    latent = getattr(args, "multi_latent_attention", False)
    head_dim = 0 if latent else getattr(args, "kv_channels", None) or 0
    learned = args.position_embedding_type == "learned_absolute"
    expert_ffn = getattr(args, "moe_ffn_hidden_size", None) or 0
    freq = str(getattr(args, "moe_layer_freq", 1))
    return Model(
        name=name,
        hidden=hidden,
        heads=heads,
        kv_heads=args.num_query_groups if grouped else heads,
        layers=args.num_layers,
        seq=args.seq_length,
        vocab=vocab,
        ffn=args.ffn_hidden_size,
        gated=bool(args.swiglu or getattr(args, "quick_geglu", False)),
        norm="rmsnorm" if args.normalization == "RMSNorm" else "layernorm",
        bias=args.add_bias_linear,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        learned_positions=learned,
        dropout=args.attention_dropout > 0 or args.hidden_dropout > 0,
        experts=experts,
        experts_per_token=args.moe_router_topk if experts else 1,
        head_dim=0 if head_dim * heads == hidden else head_dim,
        qkv_bias=bool(getattr(args, "add_qkv_bias", False) and not args.add_bias_linear),
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        expert_ffn=expert_ffn if experts else 0,
        moe_layers=moe_layers(freq, args.num_layers) if experts else "",
        shared_ffn=getattr(args, "moe_shared_expert_intermediate_size", None) or 0,
        shared_gate=bool(getattr(args, "moe_shared_expert_gate", False)),
        mla=latent_attention(args) if latent else None,
        mtp=getattr(args, "mtp_num_layers", None) or 0,
        positions=table_length(args) if learned else 0,
    )
