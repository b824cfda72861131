"""Measure a stock run without touching its schedule (``--bpipe-report`` without ``--bpipe``).

Megatron's own function runs; the two helpers it calls for each micro-batch are wrapped while it
does, so that the recorder sees the same op boundaries as under BPipe.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_bpipe.integration.checks.schedule import schedule_name
from megatron_bpipe.integration.session import Session
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.ops import Kind, Op


def make_observed(
    stock: Callable[..., Any], schedules: Any, session: Session
) -> Callable[..., Any]:
    """``stock`` with the recorder listening."""

    @functools.wraps(stock)  # callers look at its signature
    def forward_backward_observed(**named: Any) -> Any:
        """Megatron's own schedule, observed."""
        if named.get("forward_only", False):
            return stock(**named)
        communicator = named.get("p2p_communicator")
        group = (
            communicator.pp_group
            if communicator is not None
            else schedules.parallel_state.get_pipeline_model_parallel_group()
        )
        given = named["model"]
        models = given if isinstance(given, list) else [given]
        session.observe(group, models)
        forward, backward = schedules.forward_step, schedules.backward_step
        schedules.forward_step = _observed_forward(forward, session)
        config = schedules.get_model_config(models[0])
        order = _backwards(group, named["num_microbatches"], len(models), config)
        schedules.backward_step = _observed_backward(backward, session, order)
        try:
            losses = stock(**named)
        finally:
            schedules.forward_step, schedules.backward_step = forward, backward
        session.end(losses)
        return losses

    return forward_backward_observed


def _observed_forward(forward_step: Callable[..., Any], session: Session) -> Callable[..., Any]:
    signature = inspect.signature(forward_step)

    def observed(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        microbatch, chunk = (bound.arguments[n] for n in ("current_microbatch", "vp_stage"))
        op = Op(Kind.FORWARD, microbatch, chunk or 0)
        assert session.recorder is not None
        session.recorder.forward_begins(op)
        start = time.perf_counter()
        result = forward_step(*positional, **named)
        session.recorder.forward_done(op, result[0])
        session.recorder.op_done(op, start, time.perf_counter(), 0)
        return result

    return observed


def _backwards(group: Any, count: int, chunks: int, config: Any) -> list[Op]:
    """The backwards of this stage in Megatron's order; its helper is not told which one it runs."""
    size = getattr(config, "microbatch_group_size_per_vp_stage", None) if chunks > 1 else None
    name = schedule_name(None, chunks)
    base = make(ScheduleSpec(name, group.size(), count, chunks, size))
    return [op for op in base.stages[group.rank()] if op.kind is Kind.BACKWARD]


def _observed_backward(
    backward_step: Callable[..., Any], session: Session, order: Sequence[Op]
) -> Callable[..., Any]:
    ahead = iter(order)

    def observed(*positional: Any, **named: Any) -> Any:
        op = next(ahead)
        start = time.perf_counter()
        result = backward_step(*positional, **named)
        assert session.recorder is not None
        session.recorder.op_done(op, start, time.perf_counter(), 0)
        return result

    return observed
