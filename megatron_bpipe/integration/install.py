"""Install and remove the patch set: the one piece of global state of this project.

    install()                      wraps Megatron's argument parser, nothing else
      arguments parsed, --bpipe    replaces one attribute of Megatron's schedules module
      arguments parsed, neither    leaves Megatron as it is
    uninstall()                    puts back every attribute that was changed

It works before and after Megatron's modules have been imported.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from megatron_bpipe.integration.bootstrap.copy_queues import ask_for_copy_queues
from megatron_bpipe.integration.bootstrap.help_text import forgive_percent_signs
from megatron_bpipe.integration.checks.arguments import check_arguments, check_megatron
from megatron_bpipe.integration.checks.hook_points import (
    ARGUMENTS,
    CHECKPOINTING,
    CONFIG,
    FORWARD_BACKWARD,
    FORWARD_BACKWARD_INTERLEAVED,
    PARALLEL_STATE,
    SCHEDULES,
    TRAINING,
)
from megatron_bpipe.integration.checks.schedule import both_ways
from megatron_bpipe.integration.log import log_rank0
from megatron_bpipe.integration.options import Options, add_flags
from megatron_bpipe.integration.patches.chimera.install import run_both_ways
from megatron_bpipe.integration.patches.flush_free.install import never_flushes, run_without_flush
from megatron_bpipe.integration.patches.forward_backward import make_schedule
from megatron_bpipe.integration.patches.import_hook import after_import
from megatron_bpipe.integration.patches.observed import make_observed
from megatron_bpipe.integration.patches.split_backward.transformer_engine import (
    without_combined_1f1b,
)
from megatron_bpipe.integration.patches.training_log import make_logging
from megatron_bpipe.integration.patches.v_placement.checkpoints import (
    is_v_placed,
    with_placement_checked,
)
from megatron_bpipe.integration.patches.v_placement.install import place_as_v
from megatron_bpipe.integration.rank_mapping.apply import apply_placement
from megatron_bpipe.integration.session import Session
from megatron_bpipe.integration.single_gpu.launch import (
    check_single_gpu,
    send_through_host,
    set_single_gpu,
)
from megatron_bpipe.integration.single_gpu.uncoalesced_collectives import REPLACEMENTS
from megatron_bpipe.runtime.torch_internals import HOOKS_ARE_SET_BY, SHOWS_HOOKS, let_hooks_be_seen
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE


@dataclass
class _PatchSet:
    session: Session | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    stock: dict[str, Any] = field(default_factory=dict)  # what stood where something was replaced

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put ``make(stock)`` in the place of an attribute of a module or class."""
        stock = getattr(owner, name)
        setattr(owner, name, make(stock))
        self.stock[name] = stock
        self.undo.append(lambda: setattr(owner, name, stock))

    def when_imported(self, module: str, patch: Callable[[ModuleType], None]) -> None:
        self.undo.append(after_import(module, patch))


_installed: _PatchSet | None = None


def install(options: Options | None = None) -> None:
    """Install BPipe in this process.

    Args:
        options: what to do. None, the usual case: the command line says it, through the flags
            that this adds to Megatron's parser; call it before arguments are parsed. Give
            options where there is no Megatron parser (a loop of one's own on megatron.core).
    """
    global _installed
    if _installed is not None:
        return
    _installed = _PatchSet()
    if options.bpipe if options is not None else "--bpipe" in sys.argv:
        ask_for_copy_queues()  # before anything of Megatron's starts CUDA
    if options is not None:
        if options.bpipe:
            _installed.when_imported(SCHEDULES, lambda _: check_megatron())
        _activate(options)
    else:
        _installed.when_imported(ARGUMENTS, _add_flags_to_parser)


def uninstall() -> None:
    """Put Megatron back as it was, and give all memory back."""
    global _installed
    if _installed is None:
        return
    for undo in reversed(_installed.undo):
        undo()
    if _installed.session is not None:
        _installed.session.close()
    _installed = None


def status() -> dict[str, Any]:
    """What is installed: ``installed``, ``active`` (schedule replaced), ``options``."""
    session = _installed.session if _installed is not None else None
    return {
        "installed": _installed is not None,
        "active": session is not None and session.options.bpipe,
        "options": session.options if session is not None else None,
    }


def session() -> Session | None:
    """The running session, if arguments have been parsed and ask for one."""
    return _installed.session if _installed is not None else None


def write_report() -> None:
    """Write ``--bpipe-report``; for loops other than Megatron's. Every rank must call it."""
    current = session()
    if current is not None:
        current.write_report()


def _add_flags_to_parser(arguments: ModuleType) -> None:
    assert _installed is not None

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = stock(parser)
            add_flags(parser)
            forgive_percent_signs(parser)
            parse = parser.parse_known_args

            def parse_known_args(*positional: Any, **named: Any) -> Any:
                parsed, rest = parse(*positional, **named)
                _parsed(parsed)
                return parsed, rest

            parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
            return parser

        return add_megatron_arguments

    _installed.replace(arguments, "add_megatron_arguments", wrap)


def _parsed(args: Any) -> None:
    assert _installed is not None
    options = Options.from_arguments(args)
    if options.rehearsal:
        check_single_gpu(args)
    if _installed.session is not None:  # parsed a second time: the first decided
        if options.rehearsal:
            set_single_gpu(args)
        return
    if options.bpipe or options.schedule is not None:
        notice = check_arguments(args, options)
        if notice is not None:
            log_rank0(notice)
            options = replace(options, bpipe=False)
    _activate(options)
    if options.bpipe:
        assert _installed.session is not None
        _installed.session.ranks = apply_placement(args, options.placement)
    if options.rehearsal:  # after the placement, which gives ranks their devices
        set_single_gpu(args)
        _installed.replace(torch.distributed, "batch_isend_irecv", send_through_host)
        group = torch.distributed.ProcessGroup
        for name, instead in REPLACEMENTS.items():
            if hasattr(group, name):
                _installed.replace(group, name, functools.partial(_whatever_it_was, instead))


def _whatever_it_was(instead: Any, stock: Any) -> Any:
    return instead


def _activate(options: Options) -> None:
    assert _installed is not None
    ours = options.bpipe or options.schedule is not None
    if not ours and options.report is None:
        return
    patches = _installed
    current = patches.session = Session(options)
    make = make_schedule if ours else make_observed
    if not SHOWS_HOOKS:
        patches.replace(*HOOKS_ARE_SET_BY, let_hooks_be_seen)

    def replace_schedule(schedules: ModuleType) -> None:
        for point in (FORWARD_BACKWARD, FORWARD_BACKWARD_INTERLEAVED):
            patches.replace(schedules, point.name, lambda stock: make(stock, schedules, current))

    def end_with_training(training: ModuleType) -> None:
        def wrap(train: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(train)
            def train_and_end(*positional: Any, **named: Any) -> Any:
                try:
                    result = train(*positional, **named)
                except SystemExit as leaving:  # --exit-interval and the like, on all ranks at once
                    if not leaving.code:
                        current.finish()
                    raise
                current.finish()
                return result

            return train_and_end

        patches.replace(training, "train", wrap)

    def verify_placement(parallel_state: ModuleType) -> None:
        # at once when the groups stand: the first collective teaches NCCL each rank's device,
        # which Megatron's first barrier would guess from the rank
        def wrap(initialize: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(initialize)
            def initialize_and_verify(*positional: Any, **named: Any) -> Any:
                result = initialize(*positional, **named)
                group = parallel_state.get_pipeline_model_parallel_group()
                pipeline = torch.distributed.get_process_group_ranks(group)
                current.verify_placement(pipeline, torch.distributed.get_rank(group))
                return result

            return initialize_and_verify

        patches.replace(parallel_state, "initialize_model_parallel", wrap)

    def delay_weight_gradients(configuration: ModuleType) -> None:
        config = configuration.TransformerConfig
        patches.replace(config, "__post_init__", without_combined_1f1b)

    def log_throughput(training: ModuleType) -> None:
        patches.replace(training, "training_log", lambda log: make_logging(log, training, current))

    def check_placement(checkpointing: ModuleType) -> None:
        patches.replace(
            checkpointing,
            "check_checkpoint_args",
            lambda stock: with_placement_checked(stock, options.schedule),
        )

    if ours:
        patches.when_imported(CHECKPOINTING, check_placement)
    if is_v_placed(options.schedule):
        assert options.schedule is not None
        place_as_v(patches, options.schedule, lambda mirror: setattr(current, "mirror", mirror))
    if both_ways(options.schedule):
        run_both_ways(patches, lambda copies: setattr(current, "mirror", copies))
    patches.when_imported(SCHEDULES, replace_schedule)
    if never_flushes(options.schedule):
        run_without_flush(patches, current)
    patches.when_imported(TRAINING, log_throughput)
    if options.schedule is not None and CATALOGUE[options.schedule].splits_backward:
        patches.when_imported(CONFIG, delay_weight_gradients)
    if options.bpipe:
        patches.when_imported(PARALLEL_STATE, verify_placement)
    patches.when_imported(TRAINING, end_with_training)
