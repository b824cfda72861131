"""The pipeline of this rank for one call, and what the user is told when it begins."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.checks.hook_points import TRAINING
from megatron_bpipe.integration.log import log_rank0
from megatron_bpipe.integration.patches.flush_free.flushes import calls_left
from megatron_bpipe.integration.patches.flush_free.pipeline import Pipeline
from megatron_bpipe.integration.session import Session
from megatron_bpipe.runtime.weight_versions import WeightVersions
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec
from megatron_bpipe.schedule.flush_free.plan import horizon, versions_kept

MIB = 2**20


def pipeline_of(
    session: Session, spec: ScheduleSpec, group: Any, models: Sequence[torch.nn.Module]
) -> Pipeline | None:
    """The pipeline as the last call has left it, ready for the next; None if it is always flushed.

    Raises:
        RuntimeError: Megatron's own training loop does not run.
    """
    if CATALOGUE[spec.name].without_flush is None:
        return None
    session.follow(group)
    pipeline = session.pipeline
    if pipeline is None or pipeline.spec != spec:
        assert pipeline is None or not pipeline.carries, "the batch size changes after a flush only"
        trained = [p for model in models for p in model.parameters() if p.requires_grad]
        first = pipeline is None
        pipeline = session.pipeline = Pipeline(spec, group.rank(), WeightVersions(trained))
        if first:
            _tell(pipeline, group)
    training = importlib.import_module(TRAINING)
    pipeline.begin(calls_left(training, horizon(spec)))
    return pipeline


def _tell(pipeline: Pipeline, group: Any) -> None:
    """Say once, on rank 0, what changes and what it costs; a collective of the pipeline."""
    spec = pipeline.spec
    more = (versions_kept(spec, pipeline.stage) - 1) * pipeline.versions.bytes_of_one
    every: list[Any] = [None] * spec.p
    dist.all_gather_object(every, more, group=group)
    flush_free = CATALOGUE[spec.name].without_flush
    assert flush_free is not None
    lags = [flush_free.lag(spec.p, stage) for stage in range(spec.p)]
    behind = (
        f"{lags[0]} update{'s' if lags[0] > 1 else ''} on every stage"
        if len(set(lags)) == 1
        else f"{', '.join(map(str, lags))} updates on stages 0 to {spec.p - 1}"
    )
    sizes = ", ".join(f"{size / MIB:.1f}" for size in every)
    log_rank0(
        f"--bpipe-schedule {spec.name} changes the optimisation: gradients are taken at weights "
        f"that lag by {behind} (none after a flush); versions of the weights need {sizes} MiB more "
        f"on stages 0 to {spec.p - 1}"
    )


def flushed_before(save: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """``save`` of a state in which nothing has run ahead."""

    @functools.wraps(save)
    def flush_and_save(*positional: Any, **named: Any) -> Any:
        session.flush()
        return save(*positional, **named)

    return flush_and_save
