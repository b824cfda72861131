"""Flags of ``simulate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_bpipe.schedule.bases.catalogue import CATALOGUE

_BUDGET = (
    "instead of --base: BPipe with at most so many micro-batches on a stage, decimals allowed (a "
    "chunk of V counts 1/V)"
)
_CHUNKS = "instead of --base: interleaved 1F1B with so many chunks a stage, balanced"
_PARTS = "instead of --base: balanced, each activation leaves and returns in so many parts"
_TP_SHARE = "share of a computation in which tensor-parallel traffic keeps the link busy (0..1)"
_STAGE_MFU = "MFU of a single stage (default: the re-evaluation's table 5 where it has that run)"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``simulate`` subcommand."""
    parser = subparsers.add_parser(
        "simulate",
        help="time and draw a schedule before it runs, or a recorded run",
        description=(
            "Simulate the ops the executor runs and draw them: in the terminal, as a page, a "
            "figure or a trace. Without costs a forward takes 1 and a backward 2 units of time "
            "and memory is counted in micro-batches; --model gives the times and bytes of a run."
        ),
        epilog="schedules: " + "; ".join(f"{n}: {e.note}" for n, e in CATALOGUE.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--pp", type=int, metavar="P", help="pipeline stages")
    add("--microbatches", type=int, metavar="M", help="micro-batches an iteration")
    add("--base", metavar="NAME", help="the schedule (default bpipe)")
    add("--beside", metavar="NAME", help="draw this one beside it (default 1f1b; none: alone)")
    add("--budget", type=float, metavar="X", help=_BUDGET)
    add("--chunks", type=int, metavar="V", help=_CHUNKS)
    add(
        "--group", type=int, metavar="N", help="with --chunks: micro-batches of a group (default P)"
    )
    add("--parts", type=int, metavar="U", help=_PARTS)
    costs = parser.add_argument_group("costs of one micro-batch on one stage, with units (12ms)")
    costs.add_argument("--forward", metavar="TIME", help="a forward (default 1, without unit)")
    costs.add_argument("--backward", metavar="TIME", help="a backward, W included (default 2)")
    costs.add_argument("--send", metavar="TIME", help="a message between stages (default 0)")
    costs.add_argument(
        "--transfer", metavar="TIME", help="an eviction or load (default half a forward)"
    )
    costs.add_argument("--activation", metavar="SIZE", help="bytes of a micro-batch (3.5GiB)")
    costs.add_argument("--link", metavar="BANDWIDTH", help="of a pair (300GB/s), for --activation")
    costs.add_argument("--tp-share", type=float, default=0.0, metavar="U", help=_TP_SHARE)
    costs.add_argument(
        "--contention", action="store_true", help="transfers on one port share its bandwidth"
    )
    model = parser.add_argument_group("or a training run")
    model.add_argument("--model", metavar="NAME", help="'LLaMA 65B' or 'GPT-3 96B'")
    model.add_argument("--gpu", default="A100-80GB", metavar="NAME", help="default A100-80GB")
    model.add_argument("--tp", type=int, default=4, metavar="T", help="default 4")
    model.add_argument("--micro-batch", type=int, default=1, metavar="B", help="default 1")
    model.add_argument("--attention", default="flash", help="none, recompute, flash (default)")
    model.add_argument("--stage-mfu", type=float, metavar="PERCENT", help=_STAGE_MFU)
    out = parser.add_argument_group("what to write")
    out.add_argument("--html", type=Path, metavar="FILE", help="a page that works offline")
    out.add_argument("--png", type=Path, metavar="FILE", help="a figure (also .pdf)")
    out.add_argument("--svg", type=Path, metavar="FILE", help="a figure")
    out.add_argument("--trace", type=Path, metavar="FILE", help="for chrome://tracing or Perfetto")
    out.add_argument(
        "--from-report",
        type=Path,
        action="append",
        metavar="DIR",
        help="draw a recorded run (--bpipe-report) over its prediction; twice for two runs",
    )
