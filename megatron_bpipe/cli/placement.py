"""``placement``: show which logical rank runs on which GPU, without a cluster."""

from __future__ import annotations

import argparse
import json
import sys

from megatron_bpipe.placement import (
    ParallelShape,
    PlacementError,
    as_data,
    make_report,
    picture_svg,
    picture_text,
    table_text,
    traffic_text,
)


def run(args: argparse.Namespace) -> int:
    """Print the placement; returns 2 after one line on stderr when it cannot be computed."""
    try:
        if args.world is None:
            shape = ParallelShape(args.tp, args.cp, args.ep, args.dp, args.pp, args.order)
        else:
            shape = ParallelShape.from_world(
                args.world, tp=args.tp, cp=args.cp, ep=args.ep, pp=args.pp, order=args.order
            )
        gpus = min(8, shape.world) if args.gpus_per_node is None else args.gpus_per_node
        report = make_report(shape, gpus, args.placement)
        if args.svg is not None:
            args.svg.write_text(picture_svg(report), encoding="utf-8")
    except (PlacementError, OSError) as error:
        print(f"placement: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_data(report), indent=2))
    else:
        print(table_text(report), picture_text(report), traffic_text(report), sep="\n\n")
    return 0
