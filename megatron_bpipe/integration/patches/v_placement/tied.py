"""Tied embeddings: both ends are on one stage, so what Megatron sends is done on the spot.

Megatron adds each end's gradients up by itself over the micro-batches, reduces each over data
parallelism, and then adds the two. Added up in one Parameter they would come in another order and
round differently. So each end keeps a Parameter and its gradient, and the sums are Megatron's, bit
for bit. The weight is one: both Parameters have one storage, and the optimizer knows the embedding
alone. Only the distributed optimizer keeps two of everything: each chunk's weights lie in a buffer
of its own, and it goes through every weight of a buffer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron_bpipe.estimate.refusals import IN_PLACE


def tie(first: Any, last: Any) -> None:
    """Give the output layer the embedding's first weights, if both are here and tied."""
    if _shares(first, last):
        weight = last.shared_embedding_or_output_weight()
        weight.data.copy_(first.shared_embedding_or_output_weight().data)


def with_one_weight(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``get_megatron_optimizer``, which gets one weight of the two ends."""

    @functools.wraps(stock)
    def get_megatron_optimizer(*positional: Any, **named: Any) -> Any:
        bound = inspect.signature(stock).bind(*positional, **named)
        optimizer_config, chunks = (bound.arguments[name] for name in ("config", "model_chunks"))
        by_buffer = optimizer_config.use_distributed_optimizer
        by_buffer |= optimizer_config.optimizer not in IN_PLACE
        first, last = map(unwrapped, (chunks[0], chunks[-1]))
        if by_buffer or not _shares(first, last):
            return stock(*positional, **named)
        head = last.shared_embedding_or_output_weight()
        head.data = first.shared_embedding_or_output_weight().data
        trained = head.requires_grad
        head.requires_grad_(False)  # what is not trained it leaves out
        try:
            return stock(*positional, **named)
        finally:
            head.requires_grad_(trained)

    return get_megatron_optimizer


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
