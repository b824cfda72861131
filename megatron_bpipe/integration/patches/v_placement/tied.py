"""Tied embeddings: both ends are on one stage, so what Megatron sends is done on the spot.

As in Megatron each end keeps a copy, which starts equal and gets the sum of both gradients, so
both stay equal.  Two copies on one stage need memory that Megatron has on two; in return the sums
are Megatron's, bit for bit, whatever the data parallelism and the optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def tie(first: Any, last: Any) -> None:
    """Give the output layer the embedding's first weights, if both are here and tied."""
    if _shares(first, last):
        weight = last.shared_embedding_or_output_weight()
        weight.data.copy_(first.shared_embedding_or_output_weight().data)


def with_local_sum(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's sum of the tied gradients over both stages; here both are where it is asked."""

    @functools.wraps(stock)
    def allreduce_word_embedding_grads(model: list[Any], *rest: Any, **named: Any) -> None:
        stock(model, *rest, **named)
        first, last = map(unwrapped, (model[0], model[-1]))
        if _shares(first, last):
            ends = [_gradient(end.shared_embedding_or_output_weight()) for end in (first, last)]
            ends[0].add_(ends[1])
            ends[1].copy_(ends[0])

    return allreduce_word_embedding_grads


def _shares(first: Any, last: Any) -> bool:
    return bool(
        getattr(first, "share_embeddings_and_output_weights", False)
        and first.pre_process
        and last.post_process
    )


def _gradient(weight: Any) -> Any:
    return weight.main_grad if hasattr(weight, "main_grad") else weight.grad


def unwrapped(model: Any) -> Any:
    """The model within what wraps it for data parallelism and precision."""
    while hasattr(model, "module"):
        model = model.module
    return model
