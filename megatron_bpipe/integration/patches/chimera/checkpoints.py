"""One copy is saved, each copy loads: the files are those of 1F1B with the same p."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.patches.chimera.copies import DOWNWARD_COPY, UPWARD_COPY, Copies

# Megatron's arguments that loading sets, and expects not to be set yet
COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def with_one_copy_saved(stock: Callable[..., Any], copies: Copies) -> Callable[..., Any]:
    """``save_checkpoint`` (iteration, model, optimizer, ...) of the downward copy alone."""

    @functools.wraps(stock)
    def save(
        iteration: int, model: list[Any], optimizer: Any, *positional: Any, **named: Any
    ) -> Any:
        one = None if optimizer is None else copies.optimizers[DOWNWARD_COPY]
        return stock(iteration, [model[DOWNWARD_COPY]], one, *positional, **named)

    return save


def with_each_copy_loaded(
    stock: Callable[..., Any], copies: Copies, get_args: Callable[[], Any]
) -> Callable[..., Any]:
    """``load_checkpoint`` (model, optimizer, scheduler, ...) for the upward, then the downward."""

    @functools.wraps(stock)
    def load(
        ddp_model: list[Any],
        optimizer: Any,
        opt_param_scheduler: Any,
        *positional: Any,
        **named: Any,
    ) -> Any:
        args = get_args()
        before = {name: getattr(args, name) for name in COUNTERS if hasattr(args, name)}
        loaded = None
        for way in (UPWARD_COPY, DOWNWARD_COPY):  # random states are the last one's
            vars(args).update(before)
            one = None if optimizer is None else copies.optimizers[way]
            scheduler, given = opt_param_scheduler, dict(named)
            if way == UPWARD_COPY:
                scheduler = None  # it adds up what it loads
                if named.get("pp_group") is not None:
                    given["pp_group"] = copies.other_end()
            with copies.seen_by(way):
                loaded = stock([ddp_model[way]], one, scheduler, *positional, **given)
        return loaded

    return load
