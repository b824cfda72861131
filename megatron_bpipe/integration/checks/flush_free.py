"""What a schedule without a flush cannot run with, and why.

Such a schedule has forwards of the next iterations behind it when an optimizer steps, and several
versions of the weights.  Refused is whatever writes to weights that are still needed, counts by
iterations on stages that are ahead, or goes back to an iteration that is over.
"""

from __future__ import annotations

from typing import Any

from megatron_bpipe.integration.checks.refused import given
from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.options import Options
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE

OPTIMIZERS = ("adam", "sgd")
RERUN = "disabled"

# attribute of Megatron's arguments: (flag, why and what to do)
REFUSED: dict[str, tuple[str, str]] = {
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


def check_flush_free(args: Any, options: Options, count: int | None) -> None:
    """Stop unless a schedule without a flush can run with the arguments.

    Args:
        args: Megatron's, parsed but not yet validated.
        options: the user's settings.
        count: micro-batches of an iteration, None where the arguments do not fix it.

    Raises:
        Abort: it cannot; rank 0 has said which flag, its value and the reason.
    """
    name = options.schedule
    flush_free = CATALOGUE[name].without_flush if name is not None else None
    if flush_free is None:
        return
    for flag, value, why in given(args, REFUSED):
        abort(f"--bpipe-schedule {name} cannot run with {flag} {value}: {why}")
    optimizer = getattr(args, "optimizer", "adam")
    if optimizer not in OPTIMIZERS:
        abort(
            f"--bpipe-schedule {name} cannot run with --optimizer {optimizer}: it was made for "
            f"optimizers that change each parameter in place; use {' or '.join(OPTIMIZERS)}"
        )
    rerun = getattr(args, "rerun_mode", RERUN)
    if rerun != RERUN:
        abort(
            f"--bpipe-schedule {name} cannot run with --rerun-mode {rerun}: an iteration cannot be "
            f"run again when the next has begun; use --rerun-mode {RERUN}"
        )
    if options.bpipe:
        abort(
            f"--bpipe-schedule {name} cannot be balanced yet; leave --bpipe out, the schedule runs "
            "without it"
        )
    if count is not None:
        try:
            flush_free.run(args.pipeline_model_parallel_size, count, 2)
        except ValueError as error:
            abort(f"--bpipe-schedule {name} does not fit --global-batch-size: {error}")
