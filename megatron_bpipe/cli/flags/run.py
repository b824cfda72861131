"""Flags of ``run``."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``run`` subcommand."""
    parser = subparsers.add_parser(
        "run",
        help="run a training script with BPipe installed",
        description="Run Megatron's training script, unchanged, with BPipe installed.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="path of, say, pretrain_gpt.py")
    parser.add_argument(
        "rest",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="the script's own arguments, passed on untouched; --bpipe switches BPipe on",
    )
