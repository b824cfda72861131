"""Megatron's flags: what of a run is fixed, and what is left to the planner.

The planner reads them itself, without Megatron.  A parallel size, a micro-batch, a recomputation, a
partition or a budget that the user gives is fixed, the planner searches the rest.  Whatever the
planner does not decide goes into the command line as it stands, where Megatron's own parser judges
it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.stages import BF16, FP32, StateBytes
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.estimate.settings import DEFAULT, Recompute, Settings
from megatron_bpipe.planner.inputs.given_layers import Layers, given_layers
from megatron_bpipe.planner.inputs.given_model import given_model
from megatron_bpipe.planner.inputs.given_settings import (
    NOT_MODELLED,
    attention_of,
    not_modelled,
    of_schedule,
    recompute_of,
    recompute_words,
    refused_schedules,
    settings_of,
    state_of,
)


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; None: the planner searches it.

    ``attention_words`` are the flags of attention and recomputation as they were given.
    ``transport`` and ``schedule`` are those of ``--bpipe-transport`` and ``--bpipe-schedule``;
    ``refused`` has for each schedule that a given flag forbids what the check before training says.
    """

    tp: int | None = None
    pp: int | None = None
    cp: int = 1
    ep: int | None = None
    etp: int | None = None
    micro_batch: int | None = None
    attention: Attention | None = None
    recompute: Recompute | None = None
    unfused: bool = False
    attention_words: tuple[str, ...] = ()
    layers: Layers = field(default_factory=Layers)
    bpipe: bool | None = None
    budget: float | None = None
    transport: str | None = None
    schedule: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    settings: Settings = DEFAULT


@dataclass(frozen=True)
class Asked:
    """The user's flags, taken apart; ``kept`` has those that the planner does not decide.

    ``notes`` are lines to show: what is not modelled.  ``own_batch``: the batch comes from a
    schedule of batches, beside which Megatron refuses --global-batch-size.
    """

    model: Model
    fixed: Fixed
    global_batch: int | None
    element: int
    kept: tuple[str, ...]
    state: StateBytes = BF16
    notes: tuple[str, ...] = ()
    own_batch: bool = False
    precision: str = "bf16"


def read_flags(words: Sequence[str]) -> Asked:
    """Take Megatron's flags apart; raises EstimateError naming the flag in the way."""
    given, _ = _parser(_MODEL, _HOW, _DECIDED).parse_known_args(list(words))
    _, kept = _parser(_DECIDED).parse_known_args(list(words))
    found = given_model(given)
    attention, recompute = attention_of(given), recompute_of(given)
    fixed = Fixed(
        tp=given.tensor_model_parallel_size,
        pp=given.pipeline_model_parallel_size,
        cp=given.context_parallel_size,
        ep=given.expert_model_parallel_size,
        etp=given.expert_tensor_parallel_size,
        micro_batch=given.micro_batch_size,
        attention=attention,
        recompute=recompute,
        unfused=attention == "full" and given.attention_backend in ("unfused", "local"),
        attention_words=recompute_words(given),
        layers=given_layers(given),
        bpipe=True if given.bpipe else None,
        budget=_budget(given),
        transport=given.bpipe_transport,
        schedule=given.bpipe_schedule,
        refused=refused_schedules(given, words),
        settings=settings_of(given),
    )
    batch, own = given.global_batch_size, given.step_batch_size_schedule is not None
    if own:
        if batch is not None:
            raise EstimateError(
                f"--global-batch-size {batch}: Megatron refuses it beside "
                "--step-batch-size-schedule; leave it away"
            )
        batch = _first_batch(given.step_batch_size_schedule)
    half = given.bf16 or given.fp16
    return Asked(
        found,
        fixed,
        batch,
        2 if half else 4,
        tuple(kept),
        state_of(given) if half else FP32,
        (*not_modelled(given), *of_schedule(given)),
        own,
        "bf16" if given.bf16 else "fp16" if given.fp16 else "fp32",
    )


def _budget(given: argparse.Namespace) -> float | None:
    """--bpipe-budget as a number, None: BPipe's own."""
    text = given.bpipe_budget
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise EstimateError(f"--bpipe-budget {text}: give a number of micro-batches") from error
    return int(value) if value.is_integer() else value


def _first_batch(text: str) -> int:
    """The first batch of --step-batch-size-schedule, such as 0:384 200B:768."""
    try:
        return int(text.split()[0].split(":")[1])
    except (IndexError, ValueError) as error:
        raise EstimateError(
            f"--step-batch-size-schedule {text}: pairs like 0:384 200B:768 are expected"
        ) from error


_Flags = Mapping[str, object]  # by name: its type, a default, None for a switch, "*" for words
_MODEL: _Flags = {
    **dict.fromkeys(("num-layers", "hidden-size", "num-attention-heads", "seq-length"), int),
    **dict.fromkeys(("vocab-size", "padded-vocab-size", "ffn-hidden-size", "kv-channels"), int),
    **dict.fromkeys(("num-query-groups", "num-experts", "moe-ffn-hidden-size"), int),
    **dict.fromkeys(("max-position-embeddings", "mtp-num-layers", "q-lora-rank"), int),
    **dict.fromkeys(("moe-shared-expert-intermediate-size", "moe-latent-size"), int),
    **{"moe-router-topk": 2, "make-vocab-size-divisible-by": 128},
    # Megatron's defaults of latent attention: MLATransformerConfig
    **{"kv-lora-rank": 32, "qk-head-dim": 128, "qk-pos-emb-head-dim": 64, "v-head-dim": 128},
    **{"attention-dropout": 0.1, "hidden-dropout": 0.1},
    **{"normalization": "LayerNorm", "position-embedding-type": "learned_absolute"},
    **dict.fromkeys(("moe-layer-freq", "window-size", "window-attn-skip-freq"), str),
    **dict.fromkeys(("tokenizer-type", "tokenizer-model", "vocab-file", "softmax-type"), str),
    **dict.fromkeys(("hybrid-layer-pattern", "hybrid-override-pattern"), str),
    **dict.fromkeys(("heterogeneous-layers-config-path", "hybrid-attention-ratio"), str),
    **dict.fromkeys(("experimental-attention-variant", "linear-attention-freq"), str),
    **dict.fromkeys(("swiglu", "quick-geglu", "disable-bias-linear", "group-query-attention")),
    **dict.fromkeys(("add-qkv-bias", "qk-layernorm", "multi-latent-attention")),
    **dict.fromkeys(("moe-shared-expert-gate", "use-rotary-position-embeddings")),
    "untie-embeddings-and-output-weights": None,
}
"""Megatron's flags of the model, with Megatron's defaults."""
_HOW: _Flags = {
    **dict.fromkeys(("bf16", "fp16", "accumulate-allreduce-grads-in-fp32", "deterministic-mode")),
    **dict.fromkeys(("grad-reduce-in-bf16", "use-precision-aware-optimizer", "tp-comm-overlap")),
    **dict.fromkeys(("no-gradient-accumulation-fusion", "cross-entropy-loss-fusion")),
    **{"main-grads-dtype": "fp32", "main-params-dtype": "fp32"},
    **{"exp-avg-dtype": "fp32", "exp-avg-sq-dtype": "fp32"},
    **dict.fromkeys(("step-batch-size-schedule", "optimizer", "rerun-mode"), str),
    "bpipe-placement": str,
    **{"save": str, "ckpt-format": str, "no-save-optim": None},
    "dist-ckpt-optim-fully-reshardable": None,
    **{name.replace("_", "-"): "?" for name in NOT_MODELLED},
}
"""Flags of how a run computes that predictions take into account, or say that they do not."""
_DECIDED: _Flags = {
    **dict.fromkeys(("tensor-model-parallel-size", "pipeline-model-parallel-size"), int),
    **{"expert-model-parallel-size": int, "context-parallel-size": 1},
    **dict.fromkeys(("expert-tensor-parallel-size", "micro-batch-size", "global-batch-size"), int),
    **dict.fromkeys(("recompute-num-layers", "decoder-first-pipeline-num-layers"), int),
    **dict.fromkeys(("num-layers-per-virtual-pipeline-stage",), int),
    **dict.fromkeys(("decoder-last-pipeline-num-layers",), int),
    "num-virtual-stages-per-pipeline-rank": int,
    "recompute-modules": "*",
    **dict.fromkeys(("attention-backend", "recompute-granularity", "recompute-method"), str),
    **dict.fromkeys(("pipeline-model-parallel-layout", "bpipe-transport", "bpipe-budget"), str),
    "bpipe-schedule": str,
    **dict.fromkeys(("sequence-parallel", "use-distributed-optimizer", "bpipe")),
    **dict.fromkeys(("recompute-activations", "use-flash-attn")),
    **dict.fromkeys(("overlap-grad-reduce", "overlap-param-gather")),
    **dict.fromkeys(("account-for-embedding-in-pipeline-split",)),
    **dict.fromkeys(("account-for-loss-in-pipeline-split",)),
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
        elif kind == "*":
            parser.add_argument(f"--{name}", nargs="+")
        elif kind == "?":  # a switch, or with words
            parser.add_argument(f"--{name}", nargs="*")
        elif isinstance(kind, type):
            parser.add_argument(f"--{name}", type=kind)
        else:
            parser.add_argument(f"--{name}", type=type(kind), default=kind)
    return parser
