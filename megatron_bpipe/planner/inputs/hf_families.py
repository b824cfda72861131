"""Families of models on Hugging Face: which fields of their config.json mean what.

A field is a size (read by ``hugging_face``), becomes a flag (``hf_flags``), must have a certain
value, or says nothing about the computation (``SILENT``).  What is none of these is named in a note
rather than dropped.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A ``model_type``.

    ``qkv_bias`` where it always has one; ``qk_norm`` likewise; ``experts`` the name of the field
    with their number ("": dense); ``attention_bias`` says what that field means here: "qkv", "all"
    (every linear layer) or "both" (QKV and projection, which Megatron has no flag for).
    """

    experts: str = ""
    qkv_bias: bool = False
    qk_norm: bool = False
    latent: bool = False
    attention_bias: str = "both"
    tied: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(experts="num_local_experts"),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(experts="num_experts", qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(experts="num_experts", qk_norm=True),
    "deepseek_v2": Family(experts="n_routed_experts", latent=True),
    "deepseek_v3": Family(experts="n_routed_experts", latent=True),
    "kimi_k2": Family(experts="n_routed_experts", latent=True),
    "glm4_moe": Family(experts="n_routed_experts", attention_bias="qkv"),
    "gpt_oss": Family(experts="num_local_experts", attention_bias="all"),
}
"""Those with LLaMA's block; ``gpt2`` has names of its own."""

HYBRID = {
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
    "jamba": "state-space layers beside attention",
    "bamba": "state-space layers beside attention",
    "zamba2": "state-space layers beside attention",
    "nemotron_h": "state-space layers beside attention",
    "falcon_h1": "state-space layers beside attention",
    "granitemoehybrid": "state-space layers beside attention",
    "qwen3_next": "linear attention beside attention",
    "kimi_linear": "linear attention beside attention",
    "minimax": "linear attention beside attention",
    "recurrent_gemma": "recurrent layers beside attention",
}
OTHER = {
    "gemma": "embeddings scaled and norms with an offset",
    "gemma2": "norms after attention and FFN, and capped scores",
    "gemma3": "norms after attention and FFN",
    "gemma3_text": "norms after attention and FFN",
    "olmo2": "norms after attention and FFN",
    "falcon": "attention and FFN beside each other",
    "gpt_neox": "attention and FFN beside each other",
    "cohere": "attention and FFN beside each other",
    "llama4": "attention in chunks",
    "t5": "an encoder",
    "bert": "no causal mask",
}
"""Known families that are refused, and why."""

SILENT = frozenset(
    (
        *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version"),
        *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
        *("pretraining_tp", "output_router_logits", "router_aux_loss_coef", "auto_map"),
        *("aux_loss_alpha", "seq_aux", "ep_size", "rope_interleave", "quantization_config"),
        *("max_window_layers", "router_jitter_noise", "unk_token_id", "_name_or_path"),
        *("initial_context_length", "task_specific_params", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "n_ctx"),
        *("use_bfloat16", "output_attentions", "id2label", "label2id", "name_or_path"),
        *("topk_method", "num_experts_per_token", "experts_per_token", "swiglu_limit"),
        *("original_max_position_embeddings", "embd_pdrop", "return_dict", "language"),
    )
)
"""Fields about training, serving or files; ``topk_method`` follows from the others."""
