"""FLOPs of real models: against Megatron's own count, taken from its source without importing it.

Megatron halves attention for the causal mask, which this package (like the paper) does not, and it
leaves out the router's and multi-token prediction's small matrices; both are put back by hand here.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bpipe.estimate.models import gpt
from megatron_bpipe.estimate.time.flops import equation_1, matmul_flops
from megatron_bpipe.integration.model_from_args import model_of

BASE = {
    **{"group_query_attention": False, "num_query_groups": 1, "kv_channels": None, "swiglu": True},
    **{"normalization": "RMSNorm", "add_bias_linear": False, "attention_output_gate": False},
    **{"untie_embeddings_and_output_weights": True, "position_embedding_type": "rope"},
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "num_experts": None, "moe_layer_freq": 1},
    **{"moe_router_topk": 2, "moe_ffn_hidden_size": None, "moe_latent_size": None},
    **{"moe_shared_expert_intermediate_size": None, "mtp_num_layers": None},
    **{"multi_latent_attention": False, "experimental_attention_variant": None},
    **{"hybrid_layer_pattern": None, "is_hybrid_model": False, "hybrid_override_pattern": None},
}


def arguments(**given: Any) -> SimpleNamespace:
    args = SimpleNamespace(**(BASE | given))
    if args.kv_channels is None:  # as Megatron's validate_args does
        args.kv_channels = args.hidden_size // args.num_attention_heads
    return args


def sizes(h: int, heads: int, layers: int, seq: int, vocab: int, ffn: int, **more: Any) -> Any:
    return arguments(
        hidden_size=h,
        num_attention_heads=heads,
        num_layers=layers,
        seq_length=seq,
        padded_vocab_size=vocab,
        ffn_hidden_size=ffn,
        **more,
    )


GROUPS = {"group_query_attention": True, "num_query_groups": 8}
MODELS = {
    "Llama-3-8B": sizes(4096, 32, 32, 8192, 128256, 14336, **GROUPS),
    "Qwen2-72B": sizes(8192, 64, 80, 4096, 152064, 29568, **GROUPS),
    "Qwen3-4B, wide heads": sizes(2560, 32, 36, 4096, 151936, 9728, kv_channels=128, **GROUPS),
    "Mixtral-8x7B": sizes(4096, 32, 32, 4096, 32000, 14336, num_experts=8, **GROUPS),
    "DeepSeek-V3": sizes(
        *(7168, 128, 61, 4096, 129280, 18432),
        num_experts=256,
        moe_router_topk=8,
        moe_ffn_hidden_size=2048,
        moe_shared_expert_intermediate_size=2048,
        moe_layer_freq=[0] * 3 + [1] * 58,
        mtp_num_layers=1,
        multi_latent_attention=True,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
    ),
}


def megatrons_count(args: Any) -> float:
    """What Megatron's num_floating_point_operations says of one sequence."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("Megatron is not installed")
    for root in spec.submodule_search_locations:
        path = Path(root) / "training" / "training.py"
        if path.is_file():
            break
    else:
        pytest.skip("this Megatron has no training loop")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "num_floating_point_operations"
    )
    names: dict[str, Any] = dict.fromkeys(
        ("is_linear_attention_variant", "is_hybrid_model"), lambda _: False
    )
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names["num_floating_point_operations"](args, 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_megatrons(name: str) -> None:
    args = MODELS[name]
    s, h = args.seq_length, args.hidden_size
    if args.multi_latent_attention:
        width = args.num_attention_heads * (192 + 128)
    else:
        width = 2 * args.num_attention_heads * args.kv_channels
    layers = args.num_layers + (args.mtp_num_layers or 0)
    other_half = 3 * s * s * width * layers
    pattern = args.moe_layer_freq if isinstance(args.moe_layer_freq, list) else [1] * layers
    moe = sum(pattern) + (args.mtp_num_layers or 0) if args.num_experts else 0
    router = 6 * s * h * (args.num_experts or 0) * moe
    model = model_of(args)
    assert model is not None
    wanted = megatrons_count(args) + other_half + router
    assert matmul_flops(model, 1) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "share"), [("Mixtral-8x7B", 0.55), ("Llama-3-8B", 0.93), ("Qwen2-72B", 0.92)]
)
def test_a_plain_gpt_block_is_not_these_models(name: str, share: float) -> None:
    """What the log showed when it took every model for a GPT with 4 h in its FFN."""
    args = MODELS[name]
    plain = gpt(
        name,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        layers=args.num_layers,
        seq=args.seq_length,
        vocab=args.padded_vocab_size,
    )
    model = model_of(args)
    assert model is not None
    assert equation_1(plain, 1) / matmul_flops(model, 1) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"hybrid_layer_pattern": "M*M"},
        {"experimental_attention_variant": "gated_delta_net"},
        {"is_hybrid_model": True},
        {"heterogeneous_layers_config_path": "layers.json"},
    ],
)
def test_models_that_nobody_counts_here(change: dict[str, Any]) -> None:
    args = SimpleNamespace(**(vars(MODELS["Llama-3-8B"]) | change))
    assert model_of(args) is None
