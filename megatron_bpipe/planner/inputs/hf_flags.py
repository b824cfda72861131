"""Fields of a config.json that are no sizes: each becomes Megatron's flag or is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.planner.inputs.hf_families import Family
from megatron_bpipe.planner.inputs.hf_fields import Fields

ACTIVATIONS = ("silu", "swish")
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What Megatron's --use-rope-scaling computes with (megatron/core/models/common/embeddings/
rotary_pos_embedding.py)."""

YARN = {"original_max_position_embeddings": 4096.0, "beta_fast": 32.0, "beta_slow": 1.0}
"""Megatron's defaults (megatron/training/arguments.py, --yarn-...)."""


def extra_flags(fields: Fields, family: Family) -> list[str]:
    """Rotations, epsilon, routing: everything that a model's sizes do not say."""
    flags = _rotation(fields, family)
    epsilon = fields.maybe_float("rms_norm_eps")
    if epsilon is not None:
        flags += ["--norm-epsilon", f"{epsilon:g}"]
    activation = fields.maybe_text("hidden_act")
    if activation not in (None, *ACTIVATIONS):
        raise fields.refuse("hidden_act", "Megatron's --swiglu is silu")
    dropout = fields.maybe_float("attention_dropout") or 0.0
    if dropout:
        flags += ["--attention-dropout", f"{dropout:g}", "--hidden-dropout", "0.0"]
    if family.attention_bias == "all":  # GPT-OSS
        flags += ["--quick-geglu", "--glu-linear-offset", "1.0"]
        flags += ["--activation-func-clamp-value", "7.0"]
    return flags + (_routing(fields) if family.experts else [])


def _rotation(fields: Fields, family: Family) -> list[str]:
    """Base, share of a head and scaling, from transformers 4's fields or 5's rope_parameters."""
    given = fields.maybe_map("rope_parameters") or {}
    scaling = fields.maybe_map("rope_scaling") or given
    base = fields.maybe_float("rope_theta") or given.get("rope_theta") or 10000.0
    flags = ["--rotary-base", f"{float(base):.0f}"] if float(base) != 10000.0 else []
    share = fields.maybe_float("partial_rotary_factor") or given.get("partial_rotary_factor")
    if share is not None and float(share) != 1.0:
        flags += ["--rotary-percent", f"{float(share):g}"]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return flags
    factor = float(scaling.get("factor", 1.0))
    if kind == "llama3":
        for name, value in LLAMA_3.items():
            if float(scaling.get(name, value)) != value:
                raise fields.refuse("rope_scaling", f"Megatron's has {name} {value}")
        return [*flags, "--use-rope-scaling", "--rope-scaling-factor", f"{factor:g}"]
    if kind == "linear":
        return [*flags, "--rotary-seq-len-interpolation-factor", f"{factor:.0f}"]
    if kind == "yarn" and family.latent:
        return flags + _yarn(scaling, factor, latent=True)
    if kind == "yarn":
        return ["--position-embedding-type", "yarn", *flags, *_yarn(scaling, factor, latent=False)]
    raise fields.refuse("rope_scaling", "Megatron scales rotations as llama3, linear and yarn do")


def _yarn(scaling: Mapping[str, Any], factor: float, *, latent: bool) -> list[str]:
    flags = ["--rotary-scaling-factor", f"{factor:g}"]
    for name in ("mscale", "mscale_all_dim"):
        if scaling.get(name) is not None:
            flags += ["--" + name.replace("_", "-"), f"{float(scaling[name]):g}"]
    if not latent:  # latent attention has Megatron's defaults of these
        for name, default in YARN.items():
            value = float(scaling.get(name) or default)
            if value != default:
                flags += ["--yarn-" + name.replace("_", "-"), f"{value:g}"]
    return flags


def _routing(fields: Fields) -> list[str]:
    """How tokens choose experts."""
    flags: list[str] = []
    score = fields.maybe_text("scoring_func")
    if score == "sigmoid" or fields.text("model_type") == "glm4_moe":
        flags += ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
    elif score not in (None, "softmax"):
        raise fields.refuse("scoring_func", "Megatron has softmax and sigmoid")
    if fields.data.get("norm_topk_prob") is False:
        flags.append("--moe-router-pre-softmax")
    groups, chosen = fields.maybe_number("n_group"), fields.maybe_number("topk_group")
    if groups and chosen and groups > 1:
        flags += ["--moe-router-num-groups", str(groups), "--moe-router-group-topk", str(chosen)]
    scale = fields.maybe_float("routed_scaling_factor")
    if scale is not None and scale != 1.0:
        flags += ["--moe-router-topk-scaling-factor", f"{scale:g}"]
        if "--moe-router-score-function" not in flags and "--moe-router-pre-softmax" not in flags:
            flags.append("--moe-router-pre-softmax")
    return flags


def refuse_unless(fields: Fields, name: str, *allowed: object) -> None:
    """Raise EstimateError where a field has another value than these."""
    value = fields.data.get(name)
    if value not in (None, *allowed):
        raise EstimateError(
            f"{fields.path}: {name} is {value!r}: Megatron has no flag for it; the planner knows "
            f"{' or '.join(map(repr, allowed))}"
        )
