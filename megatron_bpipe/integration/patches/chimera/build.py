"""Builds both copies of a stage with Megatron's own functions, each called once for each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.patches.chimera.copies import UPWARD_COPY, WAYS, Copies
from megatron_bpipe.integration.patches.v_placement.tied import tie, unwrapped


def with_both_copies(stock: Callable[..., list[Any]], copies: Copies) -> Callable[..., list[Any]]:
    """``stock``, which builds a stage's list of models: that of the downward, then the upward."""

    @functools.wraps(stock)
    def build(*positional: Any, **named: Any) -> list[Any]:
        models: list[Any] = []
        for way in WAYS:
            turn = copies.turned if way == UPWARD_COPY else _as_it_is
            given = {name: turn(value) for name, value in named.items()}
            with copies.seen_by(way):
                models += stock(*map(turn, positional), **given)
        for model, part in zip(copies.by_part(models), sorted(copies.parts), strict=True):
            _begin_alike(model, copies.parts[part])
        tie(*map(unwrapped, copies.by_part(models)))
        for parameter in models[UPWARD_COPY].parameters():
            parameter.shared = True  # no norm counts it: the downward copy is elsewhere
        return models

    return build


def with_gradients_of_all_copies(stock: Callable[..., None], copies: Copies) -> Callable[..., None]:
    """``DistributedDataParallel.__init__`` whose gradients are averaged over all copies."""

    @functools.wraps(stock)
    def init(self: Any, *positional: Any, **named: Any) -> None:
        part = copies.parts[copies.part].group

        def of_the_part(value: Any) -> Any:
            if not hasattr(value, "dp") or not isinstance(value.dp, dist.ProcessGroup):
                return value
            return copies.with_data_groups(value, part)

        given = {name: of_the_part(value) for name, value in named.items()}
        with copies.averaged_over_copies():
            stock(self, *map(of_the_part, positional), **given)

    return init


def _begin_alike(model: Any, part: Any) -> None:
    """All copies begin with the values of the one that Megatron has."""
    with torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, src=part.owner, group=part.group)


def _as_it_is(value: Any) -> Any:
    return value
