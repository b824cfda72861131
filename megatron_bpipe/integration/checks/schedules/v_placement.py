"""Whether the V placement can run with the arguments (``estimate.refusals`` has why not)."""

from __future__ import annotations

import os
from typing import Any

from megatron_bpipe.estimate.refusals import V_PLACED
from megatron_bpipe.integration.checks.refused import check_given, check_there
from megatron_bpipe.integration.log import abort


def check_v_placement(args: Any, schedule: str) -> None:
    """Look at Megatron's parsed arguments.

    Raises:
        Abort: the V placement cannot run with one; rank 0 has said which, and why.
    """
    check_given(args, schedule, V_PLACED)
    if getattr(args, "save", None):
        _check_save(args, schedule)
    check_there(schedule, "v_placement")


def _check_save(args: Any, schedule: str) -> None:
    """What a run under another placement would load without an error, and wrongly, is not saved."""
    if is_by_rank(args):
        abort(
            f"--bpipe-schedule {schedule} cannot save with --ckpt-format torch: it holds each "
            "rank's own layers, which another schedule would load as its own; use torch_dist"
        )
    if is_by_bucket(args):
        flag = "dist-ckpt-optim-fully-reshardable"
        if not hasattr(args, flag.replace("-", "_")):  # before 0.15
            flag = "ckpt-fully-parallel-save"
        abort(
            f"--bpipe-schedule {schedule} cannot save --use-distributed-optimizer by bucket: a "
            "bucket holds each rank's own layers, which another schedule would load as its own; "
            f"add --{flag}"
        )
    if _saves_both_ends(args):
        abort(
            f"--bpipe-schedule {schedule} cannot save tied embeddings in parallel over data "
            "parallelism: both ends are on one rank, and Megatron would have it write them both; "
            "add --no-ckpt-fully-parallel-save, or --untie-embeddings-and-output-weights"
        )


def _saves_both_ends(args: Any) -> bool:
    """Whether a rank is told to save what embedding and head share once for each of them."""
    if getattr(args, "untie_embeddings_and_output_weights", False):
        return False
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    model *= getattr(args, "context_parallel_size", 1)
    copies = int(os.environ.get("WORLD_SIZE", "1")) // model
    return copies > 1 and bool(getattr(args, "ckpt_fully_parallel_save", True))


def is_by_rank(args: Any) -> bool:
    """Whether checkpoints hold what each rank has, whatever part of the model that is."""
    return bool(getattr(args, "ckpt_format", "torch") == "torch")


def has_distributed_state(args: Any) -> bool:
    """Whether checkpoints hold the distributed optimizer's state."""
    distributed = getattr(args, "use_distributed_optimizer", False)
    return bool(distributed and not getattr(args, "no_save_optim", False))


def is_by_bucket(args: Any) -> bool:
    """Whether the distributed optimizer's state is saved by bucket, not by parameter."""
    if not has_distributed_state(args):
        return False
    if hasattr(args, "dist_ckpt_optim_fully_reshardable"):  # from 0.15
        return not args.dist_ckpt_optim_fully_reshardable
    return not getattr(args, "ckpt_fully_parallel_save", True)
