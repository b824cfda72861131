"""Flags of ``doctor``."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``doctor`` subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="say whether --bpipe can run here, and what is missing",
        description="Looks at versions, Megatron's hook points, GPUs, transports and limits. "
        "Exit status 0 if --bpipe can run, 1 if not.",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, which a terminal sees otherwise"
    )
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    parser.add_argument(
        "--heads",
        type=int,
        help="attention heads of your model: also look whether Megatron's fused softmax will run",
    )
    parser.add_argument("--tp", type=int, default=1, help="its tensor-parallel size (default 1)")
    parser.add_argument("--micro-batch", type=int, default=1, help="its micro-batch (default 1)")
    parser.add_argument("--seq", type=int, default=2048, help="its sequence length (default 2048)")
