"""What is replaced around Megatron's loop for a schedule without a flush.

training.save_checkpoint                   what runs ahead is thrown away first
training.logical_and_across_...,           gatherings of all stages that are not needed
reduce_max_stat_across_..., get_grad_norm    (`gatherings.py`)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_bpipe.integration.checks.hook_points import OPTIMIZER, TRAINING
from megatron_bpipe.integration.patches.flush_free.gatherings import (
    norm_if_used,
    own_figure,
    own_success,
)
from megatron_bpipe.integration.patches.v_placement.install import Patches
from megatron_bpipe.integration.session import Session
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE


def never_flushes(schedule: str | None) -> bool:
    """Whether a value of ``--bpipe-schedule`` means a schedule without a flush."""
    return schedule is not None and CATALOGUE[schedule].without_flush is not None


def run_without_flush(patches: Patches, session: Session) -> None:
    """Replace all."""

    def around(training: ModuleType) -> None:
        patches.replace(training, "save_checkpoint", lambda save: _flushed_before(save, session))
        patches.replace(training, "logical_and_across_model_parallel_group", own_success)
        patches.replace(training, "reduce_max_stat_across_model_parallel_group", own_figure)

    def step(optimizers: ModuleType) -> None:
        patches.replace(optimizers.ChainedOptimizer, "get_grad_norm", norm_if_used)

    patches.when_imported(TRAINING, around)
    patches.when_imported(OPTIMIZER, step)


def _flushed_before(save: Callable[..., Any], session: Session) -> Callable[..., Any]:
    @functools.wraps(save)
    def flush_and_save(*positional: Any, **named: Any) -> Any:
        session.flush()
        return save(*positional, **named)

    return flush_and_save
