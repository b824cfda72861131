"""Checkpoints across placements: distributed ones have layers by number, others by rank.

A model saved under V may go on under 1F1B or interleaving and back, in Megatron's distributed
formats.  Files by rank (``--ckpt-format torch``) and an optimizer saved by bucket hold whatever
that rank had: under another placement they would load the wrong layers' values without an error.

Megatron's fully reshardable format puts the buckets of a buffer one after the other without what
fills each up, and then looks for each parameter where it lies in the buffer with that
(``get_parameter_state_dp_zero`` and ``sharded_param_state_fully_reshardable`` in
``distrib_optimizer.py``).  Behind a bucket that is filled up it saves a parameter's state
shifted, under interleaving too; so that is not saved here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_bpipe.integration.checks.schedules.v_placement import (
    has_distributed_state,
    is_by_bucket,
    is_by_rank,
)
from megatron_bpipe.integration.log import abort
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE


def is_v_placed(schedule: str | None) -> bool:
    """Whether a value of ``--bpipe-schedule`` means the V placement."""
    return schedule is not None and CATALOGUE[schedule].v_placed


def with_placement_checked(stock: Callable[..., Any], schedule: str | None) -> Callable[..., Any]:
    """``check_checkpoint_args`` that also refuses what cannot be read under this placement."""

    @functools.wraps(stock)
    def check_checkpoint_args(checkpoint_args: Any, *rest: Any, **named: Any) -> Any:
        saved = getattr(checkpoint_args, "bpipe_schedule", None)
        if is_v_placed(saved) is not is_v_placed(schedule):
            _refuse_what_is_by_rank(checkpoint_args, saved, schedule)
        return stock(checkpoint_args, *rest, **named)

    return check_checkpoint_args


def with_buckets_checked(
    stock: Callable[..., Any], get_args: Callable[[], Any], schedule: str
) -> Callable[..., Any]:
    """``get_megatron_optimizer`` that stops all ranks if one would save its state shifted."""

    @functools.wraps(stock)
    def get_megatron_optimizer(*positional: Any, **named: Any) -> Any:
        args = get_args()
        if args.save and has_distributed_state(args):
            bound = inspect.signature(stock).bind(*positional, **named)
            here = filled_up(bound.arguments["model_chunks"])
            everywhere = [here] * dist.get_world_size()
            dist.all_gather_object(everywhere, here)
            padding = max(everywhere)
            if padding:
                abort(
                    f"--bpipe-schedule {schedule} would save the state of "
                    "--use-distributed-optimizer wrongly: Megatron shifts what lies behind a "
                    f"bucket that is filled up, here by {padding} elements; add "
                    "--no-save-optim, --untie-embeddings-and-output-weights where embeddings are "
                    "tied, or drop --use-distributed-optimizer"
                )
        return stock(*positional, **named)

    return get_megatron_optimizer


def filled_up(chunks: Sequence[Any]) -> int:
    """By how many elements buckets are filled up that others of their buffer lie behind."""
    return sum(
        bucket.grad_data.numel() - bucket.numel_unpadded
        for chunk in chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        for bucket in buffer.buckets[:-1]
    )


def _refuse_what_is_by_rank(saved_args: Any, saved: str | None, schedule: str | None) -> None:
    across = f"saved with --bpipe-schedule {saved}, loaded with {schedule}"
    if is_by_rank(saved_args):
        abort(
            f"--ckpt-format torch holds each rank's own layers, and the placement differs ({across}"
            "); save with --ckpt-format torch_dist",
            on_every_rank=True,
        )
    if is_by_bucket(saved_args):
        abort(
            "the checkpoint's distributed optimizer was saved by bucket, and the placement differs "
            f"({across}); save with --dist-ckpt-optim-fully-reshardable",
            on_every_rank=True,
        )
