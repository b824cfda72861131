"""Puts the V placement's replacements in place; the package's docstring gives the reasons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from megatron_bpipe.integration.checks.hook_points import (
    DIST_UTILS,
    FINALIZE,
    PARALLEL_STATE,
    TRAINING,
)
from megatron_bpipe.integration.patches.v_placement.build import with_v_placed_chunks
from megatron_bpipe.integration.patches.v_placement.checkpoints import with_buckets_checked
from megatron_bpipe.integration.patches.v_placement.mirror import UPWARD_CHUNK, Mirror
from megatron_bpipe.integration.patches.v_placement.tied import with_local_sum, with_one_weight


class Patches(Protocol):
    """What can be taken back (`integration.install`)."""

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put ``make(stock)`` in the place of an attribute."""

    def when_imported(self, module: str, patch: Callable[[ModuleType], None]) -> None:
        """Call ``patch`` when the module has been imported."""


def place_as_v(patches: Patches, schedule: str, use: Callable[[Mirror], None]) -> None:
    """Replace all; ``use`` gets the mirror as soon as Megatron's groups can be asked for."""

    def turn(parallel_state: ModuleType) -> None:
        mirror = Mirror(parallel_state, parallel_state.get_pipeline_model_parallel_group)
        patches.replace(
            parallel_state, "get_pipeline_model_parallel_group", lambda stock: mirror.group
        )
        patches.replace(
            parallel_state, "is_pipeline_last_stage", lambda stock: _last_part(stock, mirror)
        )
        patches.replace(parallel_state, "initialize_model_parallel", with_tied_ends_here)
        use(mirror)
        patches.when_imported(TRAINING, functools.partial(build, mirror))
        sum_tied_where_asked(patches)

    def build(mirror: Mirror, training: ModuleType) -> None:
        patches.replace(training, "get_model", lambda stock: with_v_placed_chunks(stock, mirror))
        patches.replace(
            training,
            "get_megatron_optimizer",
            lambda stock: with_buckets_checked(with_one_weight(stock), training.get_args, schedule),
        )
        patches.when_imported(DIST_UTILS, functools.partial(build_by_config, mirror))

    def build_by_config(mirror: Mirror, dist_utils: ModuleType) -> None:
        if hasattr(dist_utils, "build_virtual_pipeline_stages"):
            patches.replace(
                dist_utils,
                "build_virtual_pipeline_stages",
                lambda stock: with_v_placed_chunks(stock, mirror),
            )

    patches.when_imported(PARALLEL_STATE, turn)


def sum_tied_where_asked(patches: Patches) -> None:
    """Sum the gradients of tied embeddings on the stage that has both ends."""

    def sum_here(finalize: ModuleType) -> None:
        patches.replace(finalize, "_allreduce_word_embedding_grads", with_local_sum)

    patches.when_imported(FINALIZE, sum_here)


def _last_part(stock: Callable[..., bool], mirror: Mirror) -> Callable[..., bool]:
    @functools.wraps(stock)
    def is_pipeline_last_stage(ignore_virtual: bool = True, vp_stage: int | None = None) -> bool:
        if ignore_virtual or vp_stage is None:
            return stock(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        return vp_stage == UPWARD_CHUNK and mirror.stage == 0

    return is_pipeline_last_stage


def with_tied_ends_here(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``initialize_model_parallel``, for which each pipeline's stage 0 has both ends by itself."""

    @functools.wraps(stock)
    def initialize_model_parallel(*positional: Any, **named: Any) -> Any:
        named["get_embedding_ranks"] = lambda ranks, *rest: [ranks[0]]
        return stock(*positional, **named)

    return initialize_model_parallel
