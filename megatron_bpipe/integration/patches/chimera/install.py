"""Puts Chimera's replacements in place; the package's docstring gives the reasons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_bpipe.integration.checks.hook_points import (
    DATA_PARALLEL,
    MODEL_BUILDER,
    OPTIMIZER,
    PARALLEL_STATE,
    TRAINING,
)
from megatron_bpipe.integration.patches.chimera.build import (
    with_both_copies,
    with_gradients_of_all_copies,
)
from megatron_bpipe.integration.patches.chimera.checkpoints import (
    with_each_copy_loaded,
    with_one_copy_saved,
)
from megatron_bpipe.integration.patches.chimera.copies import Copies
from megatron_bpipe.integration.patches.chimera.data import with_both_iterators
from megatron_bpipe.integration.patches.chimera.optimizer import with_both_optimizers
from megatron_bpipe.integration.patches.v_placement.install import (
    Patches,
    sum_tied_where_asked,
    with_tied_ends_here,
)

DEFAULT_MINUTES = 30.0  # Megatron's, for a collective


def run_both_ways(patches: Patches, use: Callable[[Copies], None]) -> None:
    """Replace all; ``use`` gets the copies as soon as Megatron's groups can be asked for."""

    def turn(parallel_state: ModuleType) -> None:
        copies = Copies(
            parallel_state,
            parallel_state.get_pipeline_model_parallel_group,
            data_group=parallel_state.get_data_parallel_group,
        )
        for name, instead in (
            ("get_pipeline_model_parallel_group", copies.group),
            ("get_data_parallel_group", copies.data_parallel_group),
        ):
            patches.replace(parallel_state, name, functools.partial(_instead, instead))
        patches.replace(
            parallel_state, "initialize_model_parallel", functools.partial(_meeting, copies)
        )
        use(copies)
        patches.when_imported(TRAINING, functools.partial(train, copies))
        sum_tied_where_asked(patches)
        patches.when_imported(DATA_PARALLEL, functools.partial(average, copies))

    def train(copies: Copies, training: ModuleType) -> None:
        loading = functools.partial(
            with_each_copy_loaded, copies=copies, get_args=training.get_args
        )
        feeding = functools.partial(with_both_iterators, copies=copies)
        patches.replace(training, "get_model", lambda stock: with_both_copies(stock, copies))
        patches.replace(training, "build_train_valid_test_data_iterators", feeding)
        patches.replace(
            training, "save_checkpoint", lambda stock: with_one_copy_saved(stock, copies)
        )
        patches.replace(training, "load_checkpoint", loading)
        patches.when_imported(OPTIMIZER, functools.partial(optimize, copies, training))
        patches.when_imported(MODEL_BUILDER, functools.partial(build_by_config, copies))

    def optimize(copies: Copies, training: ModuleType, optimizers: ModuleType) -> None:
        patches.replace(
            training,
            "get_megatron_optimizer",
            lambda stock: with_both_optimizers(stock, copies, optimizers.ChainedOptimizer),
        )

    def build_by_config(copies: Copies, builder: ModuleType) -> None:
        if hasattr(builder, "unimodal_build_distributed_models"):
            patches.replace(
                builder,
                "unimodal_build_distributed_models",
                lambda stock: with_both_copies(stock, copies),
            )

    def average(copies: Copies, data_parallel: ModuleType) -> None:
        patches.replace(
            data_parallel.DistributedDataParallel,
            "__init__",
            lambda stock: with_gradients_of_all_copies(stock, copies),
        )

    patches.when_imported(PARALLEL_STATE, turn)


def _instead(instead: Any, stock: Any) -> Any:
    return instead


def _meeting(copies: Copies, stock: Callable[..., Any]) -> Callable[..., Any]:
    make_groups = with_tied_ends_here(stock)

    @functools.wraps(stock)
    def initialize_model_parallel(*positional: Any, **named: Any) -> Any:
        result = make_groups(*positional, **named)
        copies.meet(named.get("distributed_timeout_minutes", DEFAULT_MINUTES))
        return result

    return initialize_model_parallel
