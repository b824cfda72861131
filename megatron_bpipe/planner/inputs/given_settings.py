"""Recomputation, attention, precision and overlaps as Megatron's flags fix them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.stages import BF16, FP16, FP32, StateBytes
from megatron_bpipe.estimate.refusals import IN_PLACE, RERUN, refusals_of
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.estimate.settings import Recompute, Settings
from megatron_bpipe.placement.report import PLACEMENTS
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, EXECUTED

NOT_MODELLED = {
    "fp8_format": "matrix products in fp8",
    "fp4_format": "matrix products in fp4",
    "fp8_param_gather": "weights gathered in fp8",
    "use_megatron_fsdp": "parameters and gradients cut over replicas",
    "use_torch_fsdp2": "parameters and gradients cut over replicas",
    "cpu_offloading": "activations sent to the host by Transformer Engine",
    "optimizer_cpu_offload": "optimizer state on the host",
    "fine_grained_activation_offloading": "activations sent to the host",
    "overlap_moe_expert_parallel_comm": "experts' messages beside other micro-batches",
    "delay_wgrad_compute": "gradients of weights computed later",
    "moe_expert_capacity_factor": "dropped tokens",
    "moe_extended_tp": "experts cut over more ranks",
    "enable_cuda_graph": "CUDA graphs",
    "external_cuda_graph": "CUDA graphs",
    "cuda_graph_impl": "CUDA graphs",
    "hierarchical_context_parallel_sizes": "context parallelism in two levels",
    "num_distributed_optimizer_instances": "several instances of the optimizer",
    "rampup_batch_size": "smaller batches in the beginning",
    "bpipe_parts": "activations that leave in parts",
    "bpipe_balance": "balance by measured peaks",
    "bpipe_memory_limit": "balance down to a limit",
    "bpipe_recompute": "another number of layers recomputed on each stage",
}
"""Flags that change speed or memory in a way that is not predicted, and what they do."""

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def attention_of(given: argparse.Namespace) -> Attention | None:
    """What the flags say of attention and recomputation; None where they leave it open."""
    flash = given.use_flash_attn or given.attention_backend in ("flash", "fused")
    if given.recompute_granularity == "full":
        return "full"
    if flash:
        return "flash"
    if given.recompute_granularity == "selective" or given.recompute_activations:
        modules = given.recompute_modules or ["core_attn"]
        unfused = given.attention_backend == "unfused"
        if "core_attn" in modules:
            return "recompute"
        return "none" if unfused else "flash"
    return "none" if given.attention_backend == "unfused" else None


def recompute_of(given: argparse.Namespace) -> Recompute | None:
    """What is recomputed; None where the flags leave it open (or the attention says it all)."""
    if given.recompute_granularity == "full":
        method = given.recompute_method
        if method not in ("uniform", "block"):
            raise EstimateError(
                f"--recompute-granularity full needs --recompute-method uniform or block, not "
                f"{method}"
            )
        layers = given.recompute_num_layers
        if layers is None:
            raise EstimateError("--recompute-method needs --recompute-num-layers")
        return Recompute(method, layers)
    if given.recompute_granularity == "selective" or given.recompute_activations:
        return Recompute(modules=tuple(given.recompute_modules or ["core_attn"]))
    for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
        if getattr(given, name) is not None:
            raise EstimateError(
                f"--{name.replace('_', '-')} needs --recompute-granularity full or selective"
            )
    return None


def recompute_words(given: argparse.Namespace) -> tuple[str, ...]:
    """The flags of recomputation and attention as they were given."""
    words: list[str] = []
    for name in (
        "attention_backend",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
    ):
        if getattr(given, name) is not None:
            words += ["--" + name.replace("_", "-"), str(getattr(given, name))]
    if given.recompute_modules is not None:
        words += ["--recompute-modules", *given.recompute_modules]
    for name in ("recompute_activations", "use_flash_attn"):
        if getattr(given, name):
            words.append("--" + name.replace("_", "-"))
    return tuple(words)


def settings_of(given: argparse.Namespace) -> Settings:
    """Overlaps and fusions; data-parallel overlaps are what the planner's command asks for."""
    return Settings(
        tp_overlap=given.tp_comm_overlap,
        grad_fusion=not given.no_gradient_accumulation_fusion,
        loss_fusion=given.cross_entropy_loss_fusion,
        deterministic=given.deterministic_mode,
        placement=_placement(given),
    )


def _placement(given: argparse.Namespace) -> str | None:
    """--bpipe-placement; raises EstimateError where experts are cut otherwise than it can."""
    asked: str | None = given.bpipe_placement
    if asked not in (None, *PLACEMENTS):
        raise EstimateError(f"--bpipe-placement {asked}: use {' or '.join(PLACEMENTS)}")
    tp, etp = given.tensor_model_parallel_size, given.expert_tensor_parallel_size
    if asked == "pair-adjacent" and etp is not None and tp is not None and etp != tp:
        raise EstimateError(
            f"--bpipe-placement pair-adjacent does not go with --expert-tensor-parallel-size {etp} "
            f"beside --tensor-model-parallel-size {tp}: use megatron"
        )
    return asked


def state_of(given: argparse.Namespace) -> StateBytes:
    """Bytes a parameter of weights, gradients and optimizer state."""
    if given.bf16:
        state = BF16
    elif given.fp16:
        state = BF16 if given.accumulate_allreduce_grads_in_fp32 else FP16
    else:
        return FP32
    gradients, optimizer = state.gradients, state.optimizer
    if given.grad_reduce_in_bf16:
        gradients = 2
    if given.use_precision_aware_optimizer:
        gradients = min(gradients, _BYTES[given.main_grads_dtype])
        optimizer = sum(
            _BYTES[name]
            for name in (given.main_params_dtype, given.exp_avg_dtype, given.exp_avg_sq_dtype)
        )
    return StateBytes(state.weights, gradients, optimizer)


def refused_schedules(given: argparse.Namespace, words: Sequence[str]) -> dict[str, str]:
    """For each schedule that these flags forbid why, as the checks before training have it.

    Raises EstimateError where it is the schedule that is asked for, or one that does not run.
    """
    values = {word.split("=")[0]: word for word in words if word.startswith("--")}
    off = {first for first, second in itertools.pairwise(words) if second == "0"}
    found: dict[str, str] = {}
    for name in EXECUTED:
        for flag, why in refusals_of(name).values():
            if flag in values and flag not in off and not values[flag].endswith("=0"):
                found.setdefault(name, f"{flag}: {why}")
        entry = CATALOGUE[name]
        if entry.v_placed and given.save and given.ckpt_format == "torch":
            found.setdefault(name, "--ckpt-format torch: it holds each rank's own layers")
        by_parameter = given.no_save_optim or given.dist_ckpt_optim_fully_reshardable
        if entry.v_placed and given.save and not by_parameter:
            found.setdefault(
                name,
                "--save: the distributed optimizer, which a plan has, would be saved by bucket; "
                "add --dist-ckpt-optim-fully-reshardable",
            )
        if entry.without_flush is not None:
            if given.rerun_mode not in (None, RERUN):
                found.setdefault(name, f"--rerun-mode {given.rerun_mode}: use {RERUN}")
            if given.optimizer not in (None, *IN_PLACE):
                found.setdefault(name, f"--optimizer {given.optimizer}: use one of {IN_PLACE}")
    asked = given.bpipe_schedule
    if asked is not None and asked not in EXECUTED:
        raise EstimateError(f"--bpipe-schedule {asked}: use one of {', '.join(EXECUTED)}")
    if asked is None:
        return found
    if asked in found:
        raise EstimateError(f"--bpipe-schedule {asked} cannot run with {found[asked]}")
    if CATALOGUE[asked].both_ways:
        raise EstimateError(f"--bpipe-schedule {asked}: it runs, but the planner does not know it")
    if CATALOGUE[asked].without_flush is not None and given.bpipe:
        raise EstimateError(
            f"--bpipe-schedule {asked}: the planner knows it without --bpipe only; plan without, "
            "and add --bpipe to the command"
        )
    return found


def of_schedule(given: argparse.Namespace) -> tuple[str, ...]:
    """What to say of the schedule that is asked for."""
    entry = CATALOGUE.get(given.bpipe_schedule)
    if entry is None:
        return ()
    name = f"--bpipe-schedule {given.bpipe_schedule}"
    if entry.without_flush is not None:
        return (
            f"{name} changes the optimisation: weights lag by {entry.without_flush.lags}, and as "
            "many more versions of them are counted in the memory. Its time is that of the steady "
            "state without a bubble, which needs the settings of docs/schedules/flush-free.md",
        )
    if entry.v_placed and given.bpipe:
        return (f"{name} is as full on every stage: --bpipe has nothing to balance there",)
    return ()


def not_modelled(given: argparse.Namespace) -> tuple[str, ...]:
    """A line for each flag whose effect is not predicted."""
    return tuple(
        f"not modelled: --{name.replace('_', '-')} ({what})"
        for name, what in NOT_MODELLED.items()
        if getattr(given, name) not in (None, False, "none")
        and (name, getattr(given, name)) not in _AS_MODELLED
    )


_AS_MODELLED = (("bpipe_parts", ["1"]), ("bpipe_balance", ["paper"]))
