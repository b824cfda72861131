"""Each copy's own data: a sampler for each direction, as replicas of data parallelism have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.patches.chimera.copies import WAYS, Copies


def with_both_iterators(
    stock: Callable[..., tuple[Any, ...]], copies: Copies
) -> Callable[..., tuple[Any, ...]]:
    """``build_train_valid_test_data_iterators`` that gives two of each, downwards and upwards."""

    @functools.wraps(stock)
    def build(*positional: Any, **named: Any) -> tuple[Any, ...]:
        each = []
        for way in WAYS:
            with copies.seen_by(way), copies.fed_as(way):
                each.append(stock(*positional, **named))
        return tuple(list(pair) for pair in zip(*each, strict=True))

    return build
