"""``placement``: show which logical rank runs on which GPU, without a cluster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_bpipe.placement import (
    DEFAULT_ORDER,
    PLACEMENTS,
    ParallelShape,
    PlacementError,
    as_data,
    crossings_text,
    make_report,
    picture_svg,
    picture_text,
    table_text,
)


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
        "--gpus-per-node", type=int, default=8, help="ranks started on each node (default 8)"
    )
    parser.add_argument(
        "--order", default=DEFAULT_ORDER, help=f"Megatron's rank order (default {DEFAULT_ORDER})"
    )
    parser.add_argument("--placement", choices=sorted(PLACEMENTS), default="pair-adjacent")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also write a picture to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the placement; returns 2 after one line on stderr when it cannot be computed."""
    try:
        if args.world is None:
            shape = ParallelShape(args.tp, args.cp, args.ep, args.dp, args.pp, args.order)
        else:
            shape = ParallelShape.from_world(
                args.world, tp=args.tp, cp=args.cp, ep=args.ep, pp=args.pp, order=args.order
            )
        report = make_report(shape, args.gpus_per_node, args.placement)
        if args.svg is not None:
            args.svg.write_text(picture_svg(report), encoding="utf-8")
    except (PlacementError, OSError) as error:
        print(f"placement: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_data(report), indent=2))
    else:
        print(table_text(report), picture_text(report), crossings_text(report), sep="\n\n")
    return 0
