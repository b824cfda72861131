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
            "Show Megatron's 1F1B, plain or interleaved, with BPipe's evictions and loads, "
            "validated, as a drawing (one column per unit of time) or as CSV (one line per stage)."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--pp", type=int, required=True, metavar="P", help="pipeline stages")
    parser.add_argument(
        "--microbatches", type=int, required=True, metavar="M", help="micro-batches an iteration"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="X",
        help="most micro-batches of a whole stage on one stage, decimals allowed: a chunk of V "
        "counts 1/V (default: ceil((P+2)/2); with chunks the least)",
    )
    parser.add_argument(
        "--chunks",
        type=int,
        default=1,
        metavar="V",
        help="model chunks a stage: Megatron's interleaved 1F1B from 2 on",
    )
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="micro-batches that go through a chunk together (default P)",
    )
    parser.add_argument(
        "--parts",
        type=int,
        default=1,
        metavar="U",
        help="in how many parts an activation leaves and returns (default 1: whole); a part counts "
        "1/U of a micro-batch or chunk",
    )
    parser.add_argument(
        "--base", metavar="NAME", help=f"another schedule, as it is: {', '.join(CATALOGUE)}"
    )
    parser.add_argument("--stock", action="store_true", help="Megatron's schedule, not balanced")
    parser.add_argument("--csv", action="store_true", help="print CSV, complete, not a drawing")
    parser.add_argument(
        "--lowered", action="store_true", help="with messages and waits (seen in CSV)"
    )
