"""Flags of ``schedule``."""

from __future__ import annotations

import argparse

from megatron_bpipe.schedule.bases.catalogue import CATALOGUE


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``schedule`` subcommand."""
    parser = subparsers.add_parser(
        "schedule",
        help="show which stage computes, evicts and loads what, and when",
        description=(
            "Show the 1F1B schedule of Megatron with BPipe's evictions and loads, validated, "
            "as a drawing (one column per unit of time) or as CSV (one line per stage)."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--pp", type=int, required=True, metavar="P", help="pipeline stages")
    parser.add_argument(
        "--microbatches", type=int, required=True, metavar="M", help="micro-batches an iteration"
    )
    parser.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="most micro-batches on one stage (default: ceil((P+2)/2), the paper's)",
    )
    parser.add_argument(
        "--base", metavar="NAME", help=f"another schedule, as it is: {', '.join(CATALOGUE)}"
    )
    parser.add_argument("--stock", action="store_true", help="Megatron's schedule, not balanced")
    parser.add_argument("--csv", action="store_true", help="print CSV, complete, not a drawing")
    parser.add_argument(
        "--lowered", action="store_true", help="with messages and waits (seen in CSV)"
    )
