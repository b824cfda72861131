"""Stages that share a GPU compute one at a time.

A turn lasts from E or L, or else from the computation, until the computation and the copies beside
it are over on the GPU. In a schedule E and L stand right before the computation that they run
beside, and EW and LW right after it, so a turn holds all of a transfer and never a message, for
which another stage might need the turn.
"""

from __future__ import annotations

import fcntl
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def take_turns(schedules: Any, token: Path, seconds: list[float], captures: list[float]) -> None:
    """Let this process's stage compute only while it holds the lock on ``token``.

    Args:
        schedules: Megatron's module; what stock 1F1B and BPipe compute with is wrapped.
        token: a file that all stages can lock.
        seconds: of this stage's turns; each is added to the last entry.
        captures: the same for the host's time to put hooks on graphs after forwards. In a pipeline
            that is hidden as far as the GPU is behind the host; a turn ends before it.
    """
    from megatron_bpipe.runtime.store import ActivationStore

    lock = token.open("w")
    begun: list[float] = []  # when the turn that is on began

    def begin() -> None:
        if not begun:
            torch.cuda.current_stream().synchronize()
            fcntl.flock(lock, fcntl.LOCK_EX)
            begun.append(time.perf_counter())

    def opening(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def transfer(*positional: Any, **named: Any) -> Any:
            begin()
            return stock(*positional, **named)

        return transfer

    def computing(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)  # its signature is looked at
        def compute(*positional: Any, **named: Any) -> Any:
            begin()
            try:
                result = stock(*positional, **named)
                torch.cuda.synchronize()  # copies too
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
                seconds[-1] += time.perf_counter() - begun.pop()
            return result

        return compute

    def capturing(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def capture(*positional: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = stock(*positional, **named)
            captures[-1] += time.perf_counter() - started
            return result

        return capture

    schedules.forward_step = computing(schedules.forward_step)
    schedules.backward_step = computing(schedules.backward_step)
    ActivationStore.evict = opening(ActivationStore.evict)  # type: ignore[method-assign]
    ActivationStore.load = opening(ActivationStore.load)  # type: ignore[method-assign]
    ActivationStore.capture = capturing(ActivationStore.capture)  # type: ignore[method-assign]
