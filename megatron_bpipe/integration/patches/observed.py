"""Measure a stock run without touching its schedule (``--bpipe-report`` without ``--bpipe``).

Megatron's own function runs; the two helpers it calls for each micro-batch are wrapped while it
does, so that the recorder sees the same op boundaries as under BPipe.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.session import Session
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
        model = named["model"]
        session.begin(None, group, model[0] if isinstance(model, list) else model)
        forward, backward = schedules.forward_step, schedules.backward_step
        schedules.forward_step = _observed_forward(forward, session)
        schedules.backward_step = _observed_backward(backward, session)
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
        microbatch = signature.bind(*positional, **named).arguments["current_microbatch"]
        op = Op(Kind.FORWARD, microbatch)
        assert session.recorder is not None
        session.recorder.forward_begins(op)
        start = time.perf_counter()
        result = forward_step(*positional, **named)
        session.recorder.forward_done(op, result[0])
        session.recorder.op_done(op, start, time.perf_counter(), 0)
        return result

    return observed


def _observed_backward(backward_step: Callable[..., Any], session: Session) -> Callable[..., Any]:
    done = 0

    def observed(*positional: Any, **named: Any) -> Any:
        nonlocal done
        op = Op(Kind.BACKWARD, done)
        done += 1
        start = time.perf_counter()
        result = backward_step(*positional, **named)
        assert session.recorder is not None
        session.recorder.op_done(op, start, time.perf_counter(), 0)
        return result

    return observed
