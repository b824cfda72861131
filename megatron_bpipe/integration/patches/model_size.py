"""Megatron's parsed arguments as the estimator's model."""

from __future__ import annotations

from typing import Any

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Mla, Model

UNKNOWN = (
    *("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"),
    *("experimental_attention_variant", "heterogeneous_layers_config_path"),
)
"""Layers that the estimator does not know; not every release has each of these."""


def model_of(args: Any) -> Model | None:
    """The model that is trained; None for one whose FLOPs the estimator does not know."""
    if any(getattr(args, name, None) for name in UNKNOWN):
        return None
    heads, experts = args.num_attention_heads, getattr(args, "num_experts", None) or 0
    grouped = getattr(args, "group_query_attention", False)
    latent = getattr(args, "multi_latent_attention", False)
    try:
        return Model(
            name="the model",
            hidden=args.hidden_size,
            heads=heads,
            kv_heads=args.num_query_groups if grouped else heads,
            layers=args.num_layers,
            seq=args.seq_length,
            vocab=args.padded_vocab_size,
            ffn=args.ffn_hidden_size,
            gated=args.swiglu,
            norm="rmsnorm" if args.normalization == "RMSNorm" else "layernorm",
            bias=args.add_bias_linear,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            learned_positions=args.position_embedding_type == "learned_absolute",
            dropout=args.attention_dropout > 0 or args.hidden_dropout > 0,
            experts=experts,
            experts_per_token=args.moe_router_topk if experts else 1,
            expert_ffn=getattr(args, "moe_ffn_hidden_size", None) or 0,
            moe_layers=_moe_layers(args) if experts else "",
            shared_ffn=getattr(args, "moe_shared_expert_intermediate_size", None) or 0,
            head_dim=0 if latent else getattr(args, "kv_channels", None) or 0,
            mla=_latent(args) if latent else None,
            mtp=getattr(args, "mtp_num_layers", None) or 0,
        )
    except EstimateError:
        return None


def _latent(args: Any) -> Mla:
    return Mla(
        q_lora=args.q_lora_rank or 0,
        kv_lora=args.kv_lora_rank,
        nope=args.qk_head_dim,
        rope=args.qk_pos_emb_head_dim,
        v=args.v_head_dim,
    )


def _moe_layers(args: Any) -> str:
    """A 1 for each layer with experts, as ``--moe-layer-freq`` says (a number N: every N-th)."""
    freq = getattr(args, "moe_layer_freq", 1)
    if isinstance(freq, int):
        return "".join("1" if n % freq == 0 else "0" for n in range(args.num_layers))
    return "".join(map(str, freq))
