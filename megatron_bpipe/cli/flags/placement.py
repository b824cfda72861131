"""Flags of ``placement``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_bpipe.placement import DEFAULT_ORDER, PLACEMENTS


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``placement`` subcommand."""
    parser = subparsers.add_parser(
        "placement",
        help="show which rank runs on which GPU",
        description=(
            "Show which logical rank runs on which GPU so that the two stages of a BPipe pair "
            "share a node, and what crosses nodes before and after."
        ),
    )
    parser.add_argument("--pp", type=int, required=True, help="pipeline stages")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel size (default 1)")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel size (default 1)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--dp", type=int, default=1, help="data-parallel size (default 1)")
    size.add_argument("--world", type=int, help="number of ranks, instead of --dp")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        help="ranks started on each node (default 8, or all ranks where there are fewer)",
    )
    parser.add_argument(
        "--order", default=DEFAULT_ORDER, help=f"Megatron's rank order (default {DEFAULT_ORDER})"
    )
    parser.add_argument("--placement", choices=sorted(PLACEMENTS), default="pair-adjacent")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also write a picture to FILE")
