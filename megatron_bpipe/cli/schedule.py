"""``schedule``: print the balanced schedule of p stages and m micro-batches."""

from __future__ import annotations

import argparse
import shutil
import sys

from megatron_bpipe.schedule import BudgetError, Schedule, draw, lower, to_csv, validate
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, build, make
from megatron_bpipe.schedule.ops import quantity


def run(args: argparse.Namespace) -> int:
    """Print the schedule; returns 2 after one line on stderr if there is none."""
    try:
        if args.lowered and not args.csv:
            raise _UsageError("--lowered: messages and waits are seen in CSV only; add --csv")
        schedule = _build(args)
    except _UsageError as error:
        print(f"schedule: {error}", file=sys.stderr)
        return 2
    if args.csv:
        print(to_csv(schedule), end="")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(draw(schedule, width))
    return 0


class _UsageError(ValueError):
    """Names the flag, its value and the remedy."""


def _build(args: argparse.Namespace) -> Schedule:
    p, m = args.pp, args.microbatches
    if p < 1:
        raise _UsageError(f"--pp {p}: a pipeline has at least 1 stage; use --pp 1 or more")
    if m < 1:
        raise _UsageError(
            f"--microbatches {m}: an iteration has at least 1; use --microbatches 1 or more"
        )
    if args.chunks < 1:
        raise _UsageError(f"--chunks {args.chunks}: a stage has at least 1; use --chunks 1 or more")
    if args.parts < 1:
        raise _UsageError(
            f"--parts {args.parts}: an activation has at least 1; use --parts 1 to move it whole"
        )
    if args.base is not None:
        return _named(args)
    if args.stock and args.budget is not None:
        raise _UsageError(
            f"--budget {quantity(args.budget)}: Megatron's own schedule keeps no budget; drop "
            "--stock or --budget"
        )
    name = "interleaved" if args.chunks > 1 else "1f1b"
    spec = ScheduleSpec(
        name, p, m, args.chunks, args.group, not args.stock, args.budget, args.parts
    )
    if args.stock and args.parts > 1:
        raise _UsageError(f"--parts {args.parts}: nothing leaves; drop --stock or --parts")
    if args.group is not None and args.chunks == 1:
        raise _UsageError(f"--group {args.group}: only interleaving has groups; add --chunks 2")
    try:
        schedule = make(spec)
    except BudgetError as error:
        raise _UsageError(
            f"--budget {quantity(error.budget)} is too small for --pp {p} --microbatches {m}"
            f"{f' --chunks {args.chunks}' if args.chunks > 1 else ''}"
            f"{f' --parts {args.parts}' if args.parts > 1 else ''}; use "
            f"--budget {quantity(error.least)} or more"
        ) from None
    except ValueError as error:
        raise _UsageError(str(error)) from None
    if args.lowered:
        schedule = lower(schedule)
    validate(schedule)
    return schedule


def _named(args: argparse.Namespace) -> Schedule:
    """A schedule of the catalogue."""
    fixed = (
        ("--stock", args.stock),
        ("--budget", args.budget is not None),
        ("--chunks", args.chunks != 1),
        ("--group", args.group is not None),
        ("--parts", args.parts != 1),
    )
    for flag, given in fixed:
        if given:
            raise _UsageError(f"--base {args.base}: drawn as it is; drop {flag} or --base")
    try:
        schedule = build(args.base, args.pp, args.microbatches)
    except ValueError as error:
        raise _UsageError(f"--base {args.base}: {error}") from None
    return lower(schedule) if args.lowered else schedule
