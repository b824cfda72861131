"""Megatron's flags for a model and for everything that a plan decides."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.refusals import RERUN
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.planner.inputs.flags import Fixed
from megatron_bpipe.schedule.ops import quantity


def model_flags(model: Model) -> list[str]:
    """Megatron's flags for the model."""
    flags = [
        *("--num-layers", str(model.layers)),
        *("--hidden-size", str(model.hidden)),
        *("--ffn-hidden-size", str(model.ffn)),
        *("--num-attention-heads", str(model.heads)),
        *("--seq-length", str(model.seq)),
        *("--max-position-embeddings", str(model.positions or model.seq)),
        *("--vocab-size", str(model.vocab)),
    ]
    if model.kv_heads != model.heads:
        flags += ["--group-query-attention", "--num-query-groups", str(model.kv_heads)]
    if model.head_dim:
        flags += ["--kv-channels", str(model.head_dim)]
    if model.gated:
        flags.append("--swiglu")
    if model.norm == "rmsnorm":
        flags += ["--normalization", "RMSNorm"]
    if not model.bias:
        flags.append("--disable-bias-linear")
    if model.qkv_bias:
        flags.append("--add-qkv-bias")
    if model.qk_norm:
        flags.append("--qk-layernorm")
    if not model.tied_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if not model.learned_positions:
        flags += ["--position-embedding-type", "rope"]
    if not model.dropout:
        flags += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0"]
    if model.window:
        flags += ["--window-size", f"{model.window},0"]
        if model.full_every:
            flags += ["--window-attn-skip-freq", str(model.full_every)]
    if model.sinks:
        flags += ["--softmax-type", "learnable"]
    return flags + _latent(model) + _experts(model)


def _latent(model: Model) -> list[str]:
    mla = model.mla
    flags = ["--mtp-num-layers", str(model.mtp)] if model.mtp else []
    if mla is None:
        return flags
    flags += ["--multi-latent-attention", "--kv-lora-rank", str(mla.kv_lora)]
    flags += ["--q-lora-rank", str(mla.q_lora)] if mla.q_lora else []
    flags += ["--qk-head-dim", str(mla.nope), "--qk-pos-emb-head-dim", str(mla.rope)]
    return [*flags, "--v-head-dim", str(mla.v)]


def _experts(model: Model) -> list[str]:
    """Experts in one grouped product, tokens exchanged all to all: the fast ways."""
    if not model.experts:
        return []
    flags = ["--num-experts", str(model.experts)]
    flags += ["--moe-router-topk", str(model.experts_per_token)]
    if model.expert_ffn:
        flags += ["--moe-ffn-hidden-size", str(model.expert_ffn)]
    if model.moe_layers:
        flags += ["--moe-layer-freq", frequency(model.moe_layers)]
    if model.shared_ffn:
        flags += ["--moe-shared-expert-intermediate-size", str(model.shared_ffn)]
    if model.shared_gate:
        flags.append("--moe-shared-expert-gate")
    return flags


def frequency(pattern: str) -> str:
    """A pattern of dense and MoE layers as Megatron writes it, ``([0]*3+[1]*58)``."""
    runs: list[tuple[str, int]] = []
    for kind in pattern:
        if runs and runs[-1][0] == kind:
            runs[-1] = kind, runs[-1][1] + 1
        else:
            runs.append((kind, 1))
    if len(runs) <= 8:
        return "(" + "+".join(f"[{kind}]*{number}" for kind, number in runs) + ")"
    return "[" + ",".join(pattern) + "]"


def plan_flags(
    run: Run, fixed: Fixed | None = None, kept: Sequence[str] = (), *, own_batch: bool = False
) -> list[str]:
    """Megatron's (and this package's) flags for everything that the planner decides.

    What the user has ``fixed`` is written as it was given; what is among ``kept`` is not repeated;
    ``own_batch``: a schedule of batches takes the place of --global-batch-size.
    """
    fixed = fixed or Fixed()
    layout = run.layout
    flags = [
        *("--tensor-model-parallel-size", str(layout.tp)),
        *("--pipeline-model-parallel-size", str(layout.pp)),
        *("--micro-batch-size", str(run.micro_batch)),
    ]
    if not own_batch:
        flags += ["--global-batch-size", str(run.global_batch)]
    if layout.sequence_parallel:
        flags.append("--sequence-parallel")
    if layout.cp > 1:
        flags += ["--context-parallel-size", str(layout.cp)]
    if run.model.experts:
        flags += _expert_flags(run, kept)
    if run.distributed_optimizer:
        flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    elif run.entry.without_flush is not None and layout.dp > 1:
        flags.append("--overlap-grad-reduce")
    flags += _schedule(run, {word.split("=")[0] for word in kept})
    flags += fixed.layers.words or _layers(run)
    flags += fixed.attention_words or _attention(run)
    if run.bpipe or run.host:
        flags.append("--bpipe")
        if run.budget is not None:
            flags += ["--bpipe-budget", quantity(run.budget)]
        transport = "host" if run.host else fixed.transport
        flags += ["--bpipe-transport", transport] if transport else []
        if not run.moves_ranks and run.settings.placement is None:
            flags += ["--bpipe-placement", "megatron"]
    return flags


def _expert_flags(run: Run, kept: Sequence[str]) -> list[str]:
    layout = run.layout
    flags = ["--expert-model-parallel-size", str(layout.ep)] if layout.ep > 1 else []
    if layout.etp is not None:
        flags += ["--expert-tensor-parallel-size", str(layout.etp)]
    flat = {word.split("=")[0] for word in kept}
    if "--moe-grouped-gemm" not in flat:
        flags.append("--moe-grouped-gemm")
    if "--moe-token-dispatcher-type" not in flat:
        flags += ["--moe-token-dispatcher-type", "alltoall"]
    return flags


def _schedule(run: Run, kept: set[str]) -> list[str]:
    """The schedule, and what the checks before training ask for beside it."""
    if run.schedule is None:
        return []
    flags = ["--bpipe-schedule", run.schedule]
    if run.entry.without_flush is not None and "--rerun-mode" not in kept:
        flags += ["--rerun-mode", RERUN]
    return flags


def _layers(run: Run) -> list[str]:
    if run.partition:
        return ["--pipeline-model-parallel-layout", layout_text(run.partition, run.model.mtp)]
    if run.chunks > 1:
        layers = run.model.layers // (run.layout.pp * run.chunks)
        return ["--num-layers-per-virtual-pipeline-stage", str(layers)]
    return []


def _attention(run: Run) -> list[str]:
    return {
        "none": ["--attention-backend", "unfused"],
        "flash": ["--attention-backend", "flash"],
        "recompute": [
            *("--attention-backend", "unfused"),
            *("--recompute-granularity", "selective"),
        ],
        "full": [
            *("--attention-backend", "unfused" if run.unfused else "flash"),
            *("--recompute-granularity", "full"),
            *("--recompute-method", "uniform"),
            *("--recompute-num-layers", "1"),
        ],
    }[run.attention]


def layout_text(partition: Sequence[int], mtp: int = 0) -> str:
    """Megatron's text of a partition: embedding, layers and loss of each stage, ``Et*3|t*4L``."""
    last = len(partition) - 1
    return "|".join(
        ("E" if stage == 0 else "")
        + (f"t*{layers}" if layers else "")
        + (("m" * mtp + "L") if stage == last else "")
        for stage, layers in enumerate(partition)
    )
