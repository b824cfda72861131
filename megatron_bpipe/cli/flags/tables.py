"""Flags of ``tables``."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``tables`` subcommand."""
    parser = subparsers.add_parser(
        "tables",
        help="the re-evaluation's table 3 beside the estimates",
        description="Print every row of the re-evaluation's table 3 beside what the estimates say.",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--measured",
        action="store_true",
        help="published runs of others beside predictions instead, as plan --check",
    )
