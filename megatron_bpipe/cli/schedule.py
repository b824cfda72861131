"""``schedule``: print the balanced schedule of p stages and m micro-batches."""

from __future__ import annotations

import argparse
import shutil
import sys

from megatron_bpipe.schedule import (
    BudgetError,
    Schedule,
    balance,
    draw,
    lower,
    one_f_one_b,
    to_csv,
    validate,
)
from megatron_bpipe.schedule.bases.catalogue import build


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
    if args.base is not None:
        return _named(args)
    if args.stock and args.budget is not None:
        raise _UsageError(
            f"--budget {args.budget}: Megatron's own schedule keeps no budget; drop --stock or "
            "--budget"
        )
    schedule = one_f_one_b(p, m)
    if not args.stock:
        try:
            schedule = balance(schedule, args.budget)
        except BudgetError as error:
            raise _UsageError(
                f"--budget {error.budget} is too small for --pp {p} --microbatches {m}; use "
                f"--budget {error.least} or more"
            ) from None
    if args.lowered:
        schedule = lower(schedule)
    validate(schedule)
    return schedule


def _named(args: argparse.Namespace) -> Schedule:
    """A schedule of the catalogue."""
    for flag, given in (("--stock", args.stock), ("--budget", args.budget is not None)):
        if given:
            raise _UsageError(f"--base {args.base}: drawn as it is; drop {flag} or --base")
    try:
        schedule = build(args.base, args.pp, args.microbatches)
    except ValueError as error:
        raise _UsageError(f"--base {args.base}: {error}") from None
    return lower(schedule) if args.lowered else schedule
