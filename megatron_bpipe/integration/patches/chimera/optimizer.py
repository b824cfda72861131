"""An optimizer for each copy, stepped as one.

Both copies of a part get the same gradients, so they stay equal.  The upward copy's parameters are
marked as shared (`build.py`), so norms and counts of zeros have every part once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.patches.chimera.copies import Copies


def with_both_optimizers(
    stock: Callable[..., Any], copies: Copies, chained: type
) -> Callable[..., Any]:
    """``get_megatron_optimizer`` (configuration, models, ...) for the two copies one by one.

    Args:
        stock: Megatron's.
        copies: gets the two optimizers.
        chained: Megatron's ``ChainedOptimizer``.
    """

    @functools.wraps(stock)
    def build(config: Any, model_chunks: list[Any], *positional: Any, **named: Any) -> Any:
        each = tuple(stock(config, [model], *positional, **named) for model in model_chunks)
        copies.optimizers = each
        return chained([part for one in each for part in _parts(one)])

    return build


def _parts(chain: Any) -> list[Any]:
    return list(getattr(chain, "chained_optimizers", [chain]))
