"""Public architectures as their config.json has them, and the parameters that were published.

Written by hand from the model cards; training and serving fields are left away.
"""

from __future__ import annotations

from typing import Any

LLAMA_2_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_31_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "vocab_size": 128256, "rope_theta": 500000.0,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "vocab_size": 32000, "rope_theta": 10000.0,
    "sliding_window": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-05,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "rope_theta": 1000000.0, "attention_dropout": 0.0,
    "sliding_window": None,
}  # fmt: skip
QWEN2_72B = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568,
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "vocab_size": 152064, "rope_theta": 1000000.0,
    "use_sliding_window": False, "sliding_window": 131072, "rms_norm_eps": 1e-06,
}  # fmt: skip
QWEN2_57B_A14B = {
    "model_type": "qwen2_moe", "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "vocab_size": 151936, "rope_theta": 1000000.0,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480, "decoder_sparse_step": 1, "norm_topk_prob": False,
    "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_32B = {
    "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "head_dim": 128,
    "num_attention_heads": 64, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "vocab_size": 151936, "rope_theta": 1000000,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_235B = {
    "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
    "num_attention_heads": 64, "num_hidden_layers": 94, "num_key_value_heads": 4,
    "max_position_embeddings": 40960, "vocab_size": 151936, "rope_theta": 1000000.0,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
    "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "max_position_embeddings": 163840, "vocab_size": 102400, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "norm_topk_prob": False, "scoring_func": "softmax", "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "routed_scaling_factor": 1.0, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "max_position_embeddings": 163840, "vocab_size": 129280, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip
KIMI_K2 = {
    **DEEPSEEK_V3, "model_type": "kimi_k2", "num_attention_heads": 64, "vocab_size": 163840,
    "num_key_value_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
}  # fmt: skip
GLM_45_AIR = {
    "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "head_dim": 128,
    "num_attention_heads": 96, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "vocab_size": 151552, "rope_theta": 1000000,
    "partial_rotary_factor": 0.5, "use_qk_norm": False, "attention_bias": True,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_120B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "vocab_size": 201088, "rope_theta": 150000,
    "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True,
    "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 18,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 4096, "truncate": False,
    },
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
GPT2_XL = {
    "model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024,
    "vocab_size": 50257, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "llama-2-70b": (LLAMA_2_70B, 68.98),
    "llama-3.1-8b": (LLAMA_31_8B, 8.030),
    "mistral-7b": (MISTRAL_7B, 7.242),
    "mixtral-8x7b": (MIXTRAL_8X7B, 46.70),
    "qwen2-72b": (QWEN2_72B, 72.71),
    "qwen2-57b-a14b": (QWEN2_57B_A14B, 57.41),
    "qwen3-32b": (QWEN3_32B, 32.76),
    "qwen3-235b-a22b": (QWEN3_235B, 235.1),
    "deepseek-v2-lite": (DEEPSEEK_V2_LITE, 15.71),
    "deepseek-v3": ({**DEEPSEEK_V3, "num_nextn_predict_layers": 0}, 671.0),
    "kimi-k2": (KIMI_K2, 1026.0),
    "glm-4.5-air": (GLM_45_AIR, 106.9),
    "gpt-oss-120b": (GPT_OSS_120B, 116.8),
    "gpt2-xl": (GPT2_XL, 1.558),
}
"""Name: config, billions of parameters."""
