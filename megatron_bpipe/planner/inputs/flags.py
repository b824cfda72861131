"""Megatron's flags: read the model and what is fixed from them, write those of a plan.

The planner reads them itself, without Megatron: those that say the model's sizes, the batch and the
parallel sizes.  A parallel size, a micro-batch or a recomputation that the user gives is fixed, the
planner searches the rest.  Whatever the planner does not decide goes into the command line as it
stands, where Megatron's own parser judges it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Attention, Run

UNKNOWN_MODELS = {
    "--multi-latent-attention": "latent attention",
    "--moe-shared-expert-intermediate-size": "a shared expert",
    "--moe-layer-freq": "layers that differ",
    "--mtp-num-layers": "multi-token prediction",
    "--kv-channels": "heads whose width is not hidden / heads",
    "--hybrid-layer-pattern": "hybrid layers",
    "--heterogeneous-layers-config-path": "layers that differ",
}


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; None: the planner searches it."""

    tp: int | None = None
    pp: int | None = None
    cp: int = 1
    ep: int | None = None
    micro_batch: int | None = None
    attention: Attention | None = None
    bpipe: bool | None = None


@dataclass(frozen=True)
class Asked:
    """The user's flags, taken apart; ``kept`` has those that the planner does not decide."""

    model: Model
    fixed: Fixed
    global_batch: int | None
    element: int
    kept: tuple[str, ...]


def read_flags(words: Sequence[str]) -> Asked:
    """Take Megatron's flags apart; raises EstimateError naming the flag in the way."""
    for flag, what in UNKNOWN_MODELS.items():
        if flag in words:
            raise EstimateError(f"{flag}: a model with {what} is not known to the planner")
    given, _ = _parser(_SIZES, _DECIDED).parse_known_args(list(words))
    _, kept = _parser(_DECIDED).parse_known_args(list(words))
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size"):
        if getattr(given, name) is None:
            raise EstimateError(f"--{name.replace('_', '-')} is missing: give Megatron's flags")
    fixed = Fixed(
        tp=given.tensor_model_parallel_size,
        pp=given.pipeline_model_parallel_size,
        cp=given.context_parallel_size,
        ep=given.expert_model_parallel_size,
        micro_batch=given.micro_batch_size,
        attention=_attention(given),
        bpipe=True if given.bpipe else None,
    )
    element = 2 if given.bf16 or given.fp16 else 4
    return Asked(_model(given), fixed, given.global_batch_size, element, tuple(kept))


def model_flags(model: Model) -> list[str]:
    """Megatron's flags for the model."""
    flags = [
        *("--num-layers", str(model.layers)),
        *("--hidden-size", str(model.hidden)),
        *("--ffn-hidden-size", str(model.ffn)),
        *("--num-attention-heads", str(model.heads)),
        *("--seq-length", str(model.seq)),
        *("--max-position-embeddings", str(model.seq)),
        *("--vocab-size", str(model.vocab)),
    ]
    if model.kv_heads != model.heads:
        flags += ["--group-query-attention", "--num-query-groups", str(model.kv_heads)]
    if model.gated:
        flags.append("--swiglu")
    if model.norm == "rmsnorm":
        flags += ["--normalization", "RMSNorm"]
    if not model.bias:
        flags.append("--disable-bias-linear")
    if not model.tied_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if not model.learned_positions:
        flags += ["--position-embedding-type", "rope"]
    if not model.dropout:
        flags += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0"]
    if model.experts:
        flags += ["--num-experts", str(model.experts)]
        flags += ["--moe-router-topk", str(model.experts_per_token)]
    return flags


def plan_flags(run: Run) -> list[str]:
    """Megatron's (and this package's) flags for everything that the planner decides."""
    layout = run.layout
    flags = [
        *("--tensor-model-parallel-size", str(layout.tp)),
        *("--pipeline-model-parallel-size", str(layout.pp)),
        *("--micro-batch-size", str(run.micro_batch)),
        *("--global-batch-size", str(run.global_batch)),
    ]
    if layout.sequence_parallel:
        flags.append("--sequence-parallel")
    if layout.cp > 1:
        flags += ["--context-parallel-size", str(layout.cp)]
    if layout.ep > 1:
        flags += ["--expert-model-parallel-size", str(layout.ep)]
    if run.distributed_optimizer:
        flags.append("--use-distributed-optimizer")
    if run.partition:
        flags += ["--pipeline-model-parallel-layout", layout_text(run.partition)]
    if run.chunks > 1:
        layers = run.model.layers // (layout.pp * run.chunks)
        flags += ["--num-layers-per-virtual-pipeline-stage", str(layers)]
    flags += {
        "none": ["--attention-backend", "unfused"],
        "flash": ["--attention-backend", "flash"],
        "recompute": [
            *("--attention-backend", "unfused"),
            *("--recompute-granularity", "selective"),
        ],
        "full": [
            *("--attention-backend", "flash"),
            *("--recompute-granularity", "full"),
            *("--recompute-method", "uniform"),
            *("--recompute-num-layers", "1"),
        ],
    }[run.attention]
    if run.bpipe or run.host:
        flags.append("--bpipe")
        if run.budget is not None:
            flags += ["--bpipe-budget", str(run.budget)]
    if run.host:
        flags += ["--bpipe-transport", "host"]
    return flags


def layout_text(partition: Sequence[int]) -> str:
    """Megatron's text of a partition: embedding, layers and loss of each stage, ``Et*3|t*4L``."""
    last = len(partition) - 1
    return "|".join(
        ("E" if stage == 0 else "") + f"t*{layers}" + ("L" if stage == last else "")
        for stage, layers in enumerate(partition)
    )


_Flags = Mapping[str, object]  # by name: its type, a default, or None for a switch
_SIZES: _Flags = {
    **dict.fromkeys(("num-layers", "hidden-size", "num-attention-heads", "seq-length"), int),
    **dict.fromkeys(("vocab-size", "ffn-hidden-size", "num-query-groups", "num-experts"), int),
    **{"moe-ffn-hidden-size": int, "moe-router-topk": 2},
    **{"attention-dropout": 0.1, "hidden-dropout": 0.1},
    **{"normalization": "LayerNorm", "position-embedding-type": "learned_absolute"},
    **dict.fromkeys(("swiglu", "disable-bias-linear", "group-query-attention", "bf16", "fp16")),
    "untie-embeddings-and-output-weights": None,
}
"""Megatron's flags of the model, with Megatron's defaults."""
_DECIDED: _Flags = {
    **dict.fromkeys(("tensor-model-parallel-size", "pipeline-model-parallel-size"), int),
    **{"expert-model-parallel-size": int, "context-parallel-size": 1},
    **dict.fromkeys(("micro-batch-size", "global-batch-size", "recompute-num-layers"), int),
    **dict.fromkeys(("num-layers-per-virtual-pipeline-stage", "bpipe-budget"), int),
    "num-virtual-stages-per-pipeline-rank": int,
    **dict.fromkeys(("attention-backend", "recompute-granularity", "recompute-method"), str),
    **dict.fromkeys(("pipeline-model-parallel-layout", "bpipe-transport"), str),
    **dict.fromkeys(("sequence-parallel", "use-distributed-optimizer", "bpipe")),
    **dict.fromkeys(("recompute-activations", "use-flash-attn")),
}
"""Flags that the planner decides; those of them that are given are fixed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EstimateError(f"Megatron's flags: {message}")


def _parser(*groups: _Flags) -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name, kind in (item for group in groups for item in group.items()):
        if kind is None:
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(kind, type):
            parser.add_argument(f"--{name}", type=kind)
        else:
            parser.add_argument(f"--{name}", type=type(kind), default=kind)
    return parser


def _attention(given: argparse.Namespace) -> Attention | None:
    """What the flags say of attention and recomputation; None where they leave it open."""
    if given.recompute_granularity == "full":
        return "full"
    if given.recompute_granularity == "selective" or given.recompute_activations:
        return "recompute"
    if given.use_flash_attn or given.attention_backend in ("flash", "fused"):
        return "flash"
    return "none" if given.attention_backend == "unfused" else None


def _model(given: argparse.Namespace) -> Model:
    hidden, heads = given.hidden_size, given.num_attention_heads
    ffn = given.ffn_hidden_size
    if ffn is None:  # Megatron's own default
        ffn = 4 * hidden * 2 // 3 // 64 * 64 if given.swiglu else 4 * hidden
    grouped = given.group_query_attention and given.num_query_groups
    return Model(
        name="the model",
        hidden=hidden,
        heads=heads,
        kv_heads=given.num_query_groups if grouped else heads,
        layers=given.num_layers,
        seq=given.seq_length,
        vocab=given.vocab_size,
        ffn=given.moe_ffn_hidden_size or ffn if given.num_experts else ffn,
        gated=given.swiglu,
        norm="rmsnorm" if given.normalization == "RMSNorm" else "layernorm",
        bias=not given.disable_bias_linear,
        tied_embeddings=not given.untie_embeddings_and_output_weights,
        learned_positions=given.position_embedding_type == "learned_absolute",
        dropout=given.attention_dropout > 0 or given.hidden_dropout > 0,
        experts=given.num_experts or 0,
        experts_per_token=given.moe_router_topk if given.num_experts else 1,
    )
