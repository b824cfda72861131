"""What schedules of each kind cannot run with: flags of Megatron, each with its reason.

Checks before training read Megatron's parsed arguments with these tables, the planner the flags
that it was given; so what the one refuses the other does not propose.
"""

from __future__ import annotations

from megatron_bpipe.schedule.bases.catalogue import CATALOGUE

Refusals = dict[str, tuple[str, str]]
"""Attribute of Megatron's arguments: the flag, why it cannot be (and what to do)."""

SPLIT_BACKWARD: Refusals = {
    "defer_embedding_wgrad_compute": (
        "--defer-embedding-wgrad-compute",
        "W puts the output layer's weight gradient off already",
    ),
    "delay_wgrad_compute": (
        "--delay-wgrad-compute",
        "it belongs to Megatron's combined 1F1B; W sets it where it is needed",
    ),
    "overlap_dispatch_backward_with_experts_wgrad": (
        "--overlap-dispatch-backward-with-experts-wgrad",
        "experts then compute their weight gradients in B, at a time of their own",
    ),
    "tensor_parallel_num_weight_shards": (
        "--tensor-parallel-num-weight-shards",
        "a layer then gathers its weight in B and scatters its gradient there",
    ),
    "expert_tensor_parallel_num_weight_shards": (
        "--expert-tensor-parallel-num-weight-shards",
        "a layer then gathers its weight in B and scatters its gradient there",
    ),
    "mtp_num_layers": (
        "--mtp-num-layers",
        "tied embeddings then get one part of their gradient in B and one in W",
    ),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "it reduces gradients in the backward"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "it reduces gradients in the backward"),
}
"""Weight gradients apart from the rest of the backward (W)."""

V_PLACED: Refusals = {
    "mtp_num_layers": (
        "--mtp-num-layers",
        "its layers want a second embedding beside the head",
    ),
    "hybrid_layer_pattern": (
        "--hybrid-layer-pattern",
        "its layers are divided among stages by a rule of its own",
    ),
    "hybrid_override_pattern": (
        "--hybrid-override-pattern",
        "its layers are divided among stages by a rule of its own",
    ),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "it was not tried with this placement"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "it was not tried with this placement"),
    "init_model_with_meta_device": (
        "--init-model-with-meta-device",
        "tied embeddings start as copies of each other, which a meta device cannot make",
    ),
}
"""Stage 0 with both ends of the model."""

_DIVIDED = "it divides a part's state among the copies of one direction"
_BY_NUMBER = "samples are then not divided into equal micro-batches of two directions"
_BY_COPY = "each copy would measure its own values and drift from the other"

BOTH_WAYS: Refusals = {
    "use_distributed_optimizer": ("--use-distributed-optimizer", _DIVIDED),
    "use_megatron_fsdp": ("--use-megatron-fsdp", _DIVIDED),
    "use_torch_fsdp2": ("--use-torch-fsdp2", _DIVIDED),
    "init_model_with_meta_device": (
        "--init-model-with-meta-device",
        "copies start with each other's values, which a meta device does not have",
    ),
    "data_parallel_random_init": (
        "--data-parallel-random-init",
        "stages of a pair would hand out their values in different orders",
    ),
    "num_experts": ("--num-experts", "experts have data-parallel groups of their own"),
    "fp16": ("--fp16", "it was not tried; use --bf16"),
    "fp8": ("--fp8-format", _BY_COPY),
    "fp4": ("--fp4-format", _BY_COPY),
    "qk_clip": ("--qk-clip", _BY_COPY),
    "hidden_dropout": (
        "--hidden-dropout",
        "both copies on a rank would draw from one stream of random numbers; give 0",
    ),
    "attention_dropout": (
        "--attention-dropout",
        "both copies on a rank would draw from one stream of random numbers; give 0",
    ),
    "mtp_num_layers": ("--mtp-num-layers", "its layers want a second embedding beside the head"),
    "hybrid_layer_pattern": ("--hybrid-layer-pattern", "it was tried with GPT models alone"),
    "hybrid_override_pattern": ("--hybrid-override-pattern", "it was tried with GPT models alone"),
    "defer_embedding_wgrad_compute": (
        "--defer-embedding-wgrad-compute",
        "it keeps what one head on a stage needs, and there may be two models",
    ),
    "rampup_batch_size": ("--rampup-batch-size", "every size has to be p micro-batches or 2p, ..."),
    "iterations_to_skip": ("--iterations-to-skip", "it skips the samples of one direction"),
    "full_validation": ("--full-validation", _BY_NUMBER),
    "multiple_validation_sets": ("--multiple-validation-sets", _BY_NUMBER),
    "sft": ("--sft", _BY_NUMBER),
    "hybrid_context_parallel": ("--hybrid-context-parallel", _BY_NUMBER),
    "perform_rl_step": ("--perform-rl-step", "it makes the data of one direction"),
    "ckpt_assume_constant_structure": (
        "--ckpt-assume-constant-structure",
        "two parts are read one after the other, and the first one's plan would be kept",
    ),
}
"""A second pipeline in the other direction, with its own copy of the model."""

WITHOUT_FLUSH: Refusals = {
    "use_distributed_optimizer": (
        "--use-distributed-optimizer",
        "it writes new weights where older ones are still needed: drop it",
    ),
    "overlap_param_gather": (
        "--overlap-param-gather",
        "it gathers new weights while older ones are still needed: drop it",
    ),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "it gathers weights for each use: drop it"),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "it gathers weights for each use: drop it"),
    "optimizer_cpu_offload": (
        "--optimizer-cpu-offload",
        "it keeps addresses of weights, which move: drop it",
    ),
    "optimizer_cuda_graph": (
        "--optimizer-cuda-graph",
        "it keeps addresses of weights, which move: drop it",
    ),
    "fp16": (
        "--fp16",
        "a skipped update is no version of the weights, and its loss scale is no longer that of "
        "the forwards ahead: use --bf16",
    ),
    "fp8": ("--fp8-format", "quantised weights are cached across versions: use --bf16"),
    "fp4": ("--fp4-format", "quantised weights are cached across versions: use --bf16"),
    "num_experts": (
        "--num-experts",
        "what routers count in an iteration would be of two on stages that are ahead: use another "
        "schedule",
    ),
    "qk_clip": ("--qk-clip", "it measures forwards of two iterations: drop it"),
    "iterations_to_skip": (
        "--iterations-to-skip",
        "the data of an iteration to skip is read ahead of it: drop it",
    ),
    "perform_rl_step": ("--perform-rl-step", "its data depends on the newest weights: drop it"),
    "hybrid_context_parallel": (
        "--hybrid-context-parallel",
        "an iteration's data is then arranged as a whole: drop it",
    ),
    "te_rng_tracker": (
        "--te-rng-tracker",
        "its random states cannot be set back when forwards ahead are thrown away: drop it",
    ),
    "adlr_autoresume": ("--adlr-autoresume", "it saves on paths of its own: drop it"),
}
"""No flush: refused is whatever writes to weights that are still needed, counts by iterations on
stages that are ahead, or goes back to an iteration that is over."""


IN_PLACE = ("adam", "sgd")
"""Values of --optimizer that change each parameter in place and leave its storage where it is."""

RERUN = "disabled"
"""What schedules without a flush take of --rerun-mode."""


def refusals_of(name: str) -> Refusals:
    """All of one schedule of the catalogue."""
    entry = CATALOGUE[name]
    found: Refusals = {}
    if entry.splits_backward:
        found |= SPLIT_BACKWARD
    if entry.v_placed:
        found |= V_PLACED
    if entry.both_ways:
        found |= BOTH_WAYS
    if entry.without_flush is not None:
        found |= WITHOUT_FLUSH
    return found
