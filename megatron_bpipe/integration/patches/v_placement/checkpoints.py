"""Checkpoints across placements: distributed ones have layers by number, others by rank.

A model saved under V may go on under 1F1B or interleaving and back, in Megatron's distributed
formats.  Files by rank (``--ckpt-format torch``) and an optimizer saved by bucket hold whatever
that rank had: under another placement they would load the wrong layers' values without an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.checks.schedules.v_placement import is_by_bucket, is_by_rank
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
