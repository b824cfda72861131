"""``run``: start a training script of Megatron with BPipe installed in its process.

torchrun --nproc-per-node 8 -m megatron_bpipe run pretrain_gpt.py --bpipe ...
"""

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


def run(args: argparse.Namespace) -> int:
    """Run the script in this process; it ends the process itself if it fails."""
    from megatron_bpipe.integration.bootstrap.run_script import run_script

    run_script(args.script, args.rest)
    return 0
