"""The model that Megatron's flags describe.  Units: sizes in elements."""

from __future__ import annotations

import argparse
import ast

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Mla, Model
from megatron_bpipe.planner.inputs.vocabulary import tokenizer_size

REFUSED = {
    "hybrid_layer_pattern": "hybrid layers (Mamba, linear attention)",
    "hybrid_override_pattern": "hybrid layers (Mamba, linear attention)",
    "hybrid_attention_ratio": "hybrid layers (Mamba, linear attention)",
    "heterogeneous_layers_config_path": "layers that each have sizes of their own",
    "experimental_attention_variant": "attention of another kind",
    "moe_latent_size": "experts on a latent state",
    "linear_attention_freq": "linear attention",
}
"""Flags of models whose layers are of kinds that nothing here describes."""


def given_model(given: argparse.Namespace) -> Model:
    """The model; raises EstimateError naming the flag in the way."""
    for name, what in REFUSED.items():
        if getattr(given, name, None) not in (None, "", False):
            raise EstimateError(
                f"{flag(name)}: a model with {what} is not known to the planner; plan its parallel "
                "sizes with a transformer of the same width and depth, or measure a run with "
                "--bpipe-report DIR and use plan --from-report DIR"
            )
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if getattr(given, name) is None:
            raise EstimateError(f"{flag(name)} is missing: give Megatron's flags")
    hidden, heads, layers = given.hidden_size, given.num_attention_heads, given.num_layers
    ffn = given.ffn_hidden_size
    gated = given.swiglu or given.quick_geglu
    if ffn is None:  # Megatron's own default
        ffn = 4 * hidden * 2 // 3 // 64 * 64 if given.swiglu else 4 * hidden
    grouped = given.group_query_attention and given.num_query_groups
    head_dim = given.kv_channels or 0
    vocab, multiple = _vocabulary(given)
    experts = given.num_experts or 0
    pattern = moe_layers(given.moe_layer_freq, layers) if experts else ""
    learned = given.position_embedding_type == "learned_absolute"
    return Model(
        name="the model",
        hidden=hidden,
        heads=heads,
        kv_heads=given.num_query_groups if grouped else heads,
        layers=layers,
        seq=given.seq_length,
        vocab=vocab,
        ffn=ffn,
        gated=gated,
        norm="rmsnorm" if given.normalization == "RMSNorm" else "layernorm",
        bias=not given.disable_bias_linear,
        tied_embeddings=not given.untie_embeddings_and_output_weights,
        learned_positions=learned and not given.use_rotary_position_embeddings,
        dropout=given.attention_dropout > 0 or given.hidden_dropout > 0,
        experts=experts,
        experts_per_token=given.moe_router_topk if experts else 1,
        head_dim=0 if head_dim * heads == hidden else head_dim,
        qkv_bias=given.add_qkv_bias and given.disable_bias_linear,
        qk_norm=given.qk_layernorm,
        expert_ffn=(given.moe_ffn_hidden_size or 0) if experts else 0,
        moe_layers=pattern,
        shared_ffn=(given.moe_shared_expert_intermediate_size or 0) if experts else 0,
        shared_gate=given.moe_shared_expert_gate,
        mla=latent_attention(given) if given.multi_latent_attention else None,
        mtp=given.mtp_num_layers or 0,
        positions=table_length(given) if learned else 0,
        window=_window(given),
        full_every=_every(given),
        sinks=given.softmax_type == "learnable",
        vocab_multiple=multiple,
    )


def flag(name: str) -> str:
    """A parsed name as the flag that it is from."""
    return "--" + name.replace("_", "-")


def moe_layers(text: str | None, layers: int) -> str:
    """--moe-layer-freq as one character a layer, empty where all are alike.

    A number n makes every n-th layer a mixture, from the first on; otherwise it is a Python list of
    0 and 1, with + and *.  Raises EstimateError.
    """
    if text is None or text == "1":
        return ""
    if text.isdigit():
        every = int(text)
        return "".join("1" if i % every == 0 else "0" for i in range(layers))
    try:
        found = _list(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise EstimateError(
            f"--moe-layer-freq {text}: give a number or a list like ([0]*3+[1]*58)"
        ) from error
    if len(found) != layers:
        raise EstimateError(f"--moe-layer-freq {text} has {len(found)} entries for {layers} layers")
    pattern = "".join("1" if entry else "0" for entry in found)
    return "" if set(pattern) == {"1"} else pattern


def _list(node: ast.expr) -> list[int]:
    """What a list of 0 and 1 says, without running it; raises ValueError."""
    if isinstance(node, ast.List):
        return [_number(entry) for entry in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _list(node.left) + _list(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if isinstance(node.left, ast.Constant):
            return _number(node.left) * _list(node.right)
        return _list(node.left) * _number(node.right)
    raise ValueError(ast.dump(node))


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise ValueError(ast.dump(node))


def _vocabulary(given: argparse.Namespace) -> tuple[int, int]:
    """Words before padding, and what they are padded to a multiple of (times t)."""
    if given.padded_vocab_size is not None:
        return given.padded_vocab_size, 1
    size = given.vocab_size
    if size is None:
        size = tokenizer_size(given.tokenizer_type, given.tokenizer_model, given.vocab_file)
    if size is None:
        raise EstimateError("--vocab-size is missing: add --vocab-size N of your tokenizer")
    return size, given.make_vocab_size_divisible_by


def latent_attention(given: argparse.Namespace) -> Mla:
    """Sizes of multi-head latent attention, from flags or from Megatron's arguments."""
    return Mla(
        q_lora=given.q_lora_rank or 0,
        kv_lora=given.kv_lora_rank,
        nope=given.qk_head_dim,
        rope=given.qk_pos_emb_head_dim,
        v=given.v_head_dim,
    )


def table_length(given: argparse.Namespace) -> int:
    """Entries of a learned position table, 0: as many as a sequence has; from either as well."""
    longest = given.max_position_embeddings
    return 0 if longest in (None, given.seq_length) else longest


def _window(given: argparse.Namespace) -> int:
    """Tokens that sliding attention sees: --window-size 128,0 or (128,0)."""
    if given.window_size is None:
        return 0
    digits = given.window_size.strip("() ").split(",")[0]
    if not digits.strip().isdigit():
        raise EstimateError(f"--window-size {given.window_size}: give two numbers like 128,0")
    return int(digits)


def _every(given: argparse.Namespace) -> int:
    """Every so many layers attention sees all; a list is taken as its mean."""
    text = given.window_attn_skip_freq
    if text is None:
        return 0
    if text.isdigit():
        return int(text)
    try:
        found = _list(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise EstimateError(
            f"--window-attn-skip-freq {text}: give a number or a list of 0 and 1"
        ) from error
    full = found.count(0)
    return round(len(found) / full) if full else 0
