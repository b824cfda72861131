"""Flags of ``profile``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``profile`` subcommand."""
    parser = subparsers.add_parser(
        "profile",
        help="measure one stage of your model on the hardware at hand",
        usage="%(prog)s --output FILE [options] -- <Megatron's flags>",
        description="Measures forward, backward, bytes per micro-batch and MFU of one stage, with "
        "Megatron's own layers, for each micro-batch and attention method, and the output layer. "
        "One CPU or one GPU: of tensor-parallel ranks it is one. The flags after -- are those of "
        "the whole training run; what has no bearing on the layers is ignored.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument(
        "--micro-batches", default="1,2,4", metavar="B,...", help="sizes (default 1,2,4)"
    )
    parser.add_argument(
        "--attention",
        default="none,recompute,flash",
        metavar="WAY,...",
        help="none: stock; recompute: of the core attention, in the backward; flash; full: "
        "recompute whole layers (default none,recompute,flash)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="layers of the stage (default: those of one stage of the model)",
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--warm-up", type=int, default=3, metavar="N", help="passes before them (default 3)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="peak for the MFU (default: a known GPU's datasheet, else the best multiplication)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="treat the device as this large, such as 2GiB: what does not fit is a result",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, which a terminal sees otherwise"
    )
    parser.add_argument("--json", action="store_true", help="print the file's contents")
    parser.add_argument("flags", nargs="*", metavar="...", help="Megatron's flags, after --")
