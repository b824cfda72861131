"""Flags of ``compare``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``compare`` subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="two recorded runs side by side: memory, time, losses",
        description=(
            "Compare two folders that --bpipe-report wrote, of runs with equal stages and "
            "micro-batches: memory by stage, time an iteration with its spread, which copies were "
            "exposed and why, and whether all losses are the same bits. Exit status 0 if they "
            "are, 1 if not, 2 if a folder is no report."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("before", type=Path, metavar="A", help="report folder of one run")
    parser.add_argument("after", type=Path, metavar="B", help="report folder of the other")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also write memory as a figure")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
