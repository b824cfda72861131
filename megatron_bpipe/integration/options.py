"""What the user asked for, and the flags that say it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bpipe.estimate.quantities import UnitError, size
from megatron_bpipe.runtime.transport.pair.catalogue import AUTO, SPECS
from megatron_bpipe.schedule.bases.catalogue import EXECUTED

TRANSPORTS = (AUTO, *SPECS)
PAPER, MEASURED = "paper", "measured"
DEFAULT_PARTS = 1
PLACEMENTS = ("pair-adjacent", "megatron")


@dataclass(frozen=True)
class Options:
    """The user's settings.

    Attributes:
        bpipe: balance the activations of the pipeline schedule.
        budget: most micro-batches of a whole stage whose activations may occupy it, decimals
            allowed (a chunk of v counts 1/v); None: ceil((p+2)/2), with interleaving the least.
        balance: `PAPER`: stages x and p-1-x are pairs, every stage within ``budget``; `MEASURED`:
            the first iteration shows every stage's bytes, and they decide from the second on.
        recompute: layers of each model chunk that each stage recomputes; None: Megatron's flags.
        memory_limit: bytes that no GPU may exceed, for `MEASURED`; None: as few as can be.
        parts: in how many an activation leaves and returns; 1: whole; None: the default.
        schedule: one of ``schedule.bases.catalogue.EXECUTED``; None: Megatron's own.
        transport: one of `TRANSPORTS`.
        placement: one of `PLACEMENTS`.
        report: folder for ``memory.json`` and timelines, or None.
        measure_links: time copies over each pair's link before the first eviction.
        keep_local: copy, but never drop the local copy.
        rehearsal: all ranks share one GPU.
        timed: Megatron's timers around every forward, backward and message are on.
        deadline: seconds after which a transfer or a silent partner is an error.
    """

    bpipe: bool = False
    budget: float | None = None
    balance: str = PAPER
    memory_limit: int | None = None
    parts: int | None = None
    recompute: tuple[int, ...] | None = None
    schedule: str | None = None
    transport: str = AUTO
    placement: str = "pair-adjacent"
    report: Path | None = None
    measure_links: bool = False
    keep_local: bool = False
    rehearsal: bool = False
    timed: bool = False
    deadline: float = 600.0

    @property
    def clocked(self) -> bool:
        """Whether somebody reads the host's clock before and after each op."""
        return self.report is not None or self.timed

    @property
    def in_parts(self) -> int:
        """In how many parts an activation leaves and returns."""
        if self.parts is not None:
            return self.parts
        return 1 if self.balance == MEASURED else DEFAULT_PARTS

    @classmethod
    def from_arguments(cls, args: Any) -> Options:
        """Read Megatron's parsed arguments."""
        return cls(
            bpipe=args.bpipe,
            budget=args.bpipe_budget,
            balance=args.bpipe_balance,
            memory_limit=args.bpipe_memory_limit,
            recompute=args.bpipe_recompute,
            parts=args.bpipe_parts,
            schedule=args.bpipe_schedule,
            transport=args.bpipe_transport,
            placement=args.bpipe_placement,
            report=args.bpipe_report,
            measure_links=args.bpipe_measure_links,
            keep_local=args.bpipe_keep_local,
            rehearsal=args.bpipe_rehearsal,
            timed=getattr(args, "timing_log_level", 0) >= 2,
            deadline=60.0 * getattr(args, "distributed_timeout_minutes", 10),
        )


def _size(text: str) -> int:
    try:
        return size(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers = tuple(int(word) for word in text.split(","))
    except ValueError:
        layers = (-1,)
    if min(layers) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write one number of layers for each stage, for example 2,1,0,0"
        )
    return layers


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the ``bpipe`` group to Megatron's parser."""
    group = parser.add_argument_group(
        "bpipe", "memory-balanced pipeline parallelism (megatron_bpipe)"
    )
    group.add_argument(
        "--bpipe",
        action="store_true",
        help="Keep some activations of the first pipeline stages on their paired last stages.",
    )
    group.add_argument(
        "--bpipe-budget",
        type=float,
        metavar="X",
        help="Most micro-batches of a whole stage whose activations may occupy it; decimals are "
        "allowed, one chunk of v counts 1/v (default ceil((p+2)/2); with interleaving the least).",
    )
    group.add_argument(
        "--bpipe-balance",
        choices=(PAPER, MEASURED),
        default=PAPER,
        help="Who keeps whose activations: paper pairs stages x and p-1-x; measured looks at every "
        "stage's bytes in the first iteration, and from the second on whoever has room lends to "
        "whoever needs it, so that the fullest GPU is as empty as can be "
        "(docs/balance/measured.md).",
    )
    group.add_argument(
        "--bpipe-memory-limit",
        type=_size,
        metavar="SIZE",
        help="With --bpipe-balance measured: move the fewest bytes with which every GPU stays "
        "within SIZE (for example 76GiB); host memory takes what no GPU has room for.",
    )
    group.add_argument(
        "--bpipe-parts",
        type=int,
        metavar="U",
        help="In how many parts an activation leaves and returns, early layers first out and last "
        "back: less travels at the same budget, smaller budgets can be kept; 1 moves it whole, as "
        f"the paper does (default {DEFAULT_PARTS}).",
    )
    group.add_argument(
        "--bpipe-recompute",
        type=_layers,
        metavar="N0,N1,...",
        help="Recompute the first Nx layers of each model chunk of stage x, where computing again "
        "is cheaper than moving; instead of --recompute-granularity, which has one number for all.",
    )
    group.add_argument(
        "--bpipe-schedule",
        choices=EXECUTED,
        help="Run this schedule instead of Megatron's own (1f1b, or interleaved with model "
        "chunks), with or without --bpipe; chimera gives every stage a second model "
        "(docs/schedules/chimera.md).",
    )
    group.add_argument(
        "--bpipe-transport",
        default=AUTO,
        metavar="|".join(TRANSPORTS),
        help="How activations travel: "
        + ", ".join(f"{spec.name} is {spec.summary}" for spec in SPECS.values())
        + f"; {AUTO} takes the best that the link allows and says which "
        "(docs/balance/transports.md).",
    )
    group.add_argument(
        "--bpipe-placement",
        choices=PLACEMENTS,
        default="pair-adjacent",
        help="Which GPU each rank runs on: pair-adjacent moves ranks where that brings pairs onto "
        "one node, megatron leaves Megatron's order.",
    )
    group.add_argument(
        "--bpipe-report",
        type=Path,
        metavar="DIR",
        help="Write memory.json and timelines to DIR; without --bpipe it only observes.",
    )
    group.add_argument(
        "--bpipe-measure-links",
        action="store_true",
        help="Time copies over each pair's link when it opens, and say how fast they are.",
    )
    group.add_argument(
        "--bpipe-keep-local",
        action="store_true",
        help="Copy out and back but never drop the local copy: isolates numerics.",
    )
    group.add_argument(
        "--bpipe-rehearsal",
        action="store_true",
        help="Run all stages as processes on one GPU, with or without --bpipe; messages of the "
        "pipeline go through host memory.",
    )
