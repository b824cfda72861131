"""Gatherings of all stages in Megatron's loop that are left out: each is a flush in disguise.

A stage that waits for all others once an iteration waits for the one that is furthest behind:
(p-1) B of 1F1B's bubble of (p-1)(F + B) are back.  These are not needed without a flush:

* whether every stage's update succeeded: without a loss scale (refused) none fails;
* the largest gradient norm, zero count and learning rate of all stages, for the log: a norm and a
  count are of the whole model already, and every stage has the schedule's learning rate;
* the gradient norm, with ``--clip-grad 0``: only the log would show it.

What stays is needed: the norm that clips, the gradient of embeddings that two stages share, the
tokens of a loss per token, and the barrier of a line in the log.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch


def own_success(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Of the optimizer step on this rank."""

    @functools.wraps(stock)
    def success(input: bool, *_: Any, **__: Any) -> bool:
        return bool(input)

    return success


def own_figure(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Of this rank, for the log."""

    @functools.wraps(stock)
    def figure(stat: float | None, *_: Any, **__: Any) -> float | None:
        # rounded as the gathering would
        return None if stat is None else float(torch.tensor(float(stat), dtype=torch.float32))

    return figure


def norm_if_used(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient norm of the model where it clips or skips an update, else None."""

    @functools.wraps(stock)
    def get_grad_norm(self: Any) -> Any:
        settings = self.config  # of the optimizer
        skips = getattr(settings, "grad_norm_skip_threshold", math.inf)
        if settings.clip_grad > 0.0 or math.isfinite(skips):
            return stock(self)
        return None

    return get_grad_norm
