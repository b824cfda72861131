"""Flags of ``plan``."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_bpipe.estimate.hardware import GPUS
from megatron_bpipe.estimate.models import TABLE_2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``plan`` subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="which parallel sizes, schedule and memory saving to train with",
        description=(
            "Search tensor, pipeline and data parallelism, micro-batch, layers a stage, attention "
            "and recomputation, interleaving, BPipe and its budget, host offload; show the best "
            "with predicted MFU and memory, say whether BPipe pays, and end with the command to "
            "run. Parallel sizes, micro-batch and recomputation among Megatron's flags are fixed."
        ),
        usage="%(prog)s (--hf-config FILE | --model NAME | -- MEGATRON'S FLAGS) "
        "(--gpu NAME --gpus N | --cluster FILE) [options], or --from-report DIR",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("flags", nargs="*", metavar="-- MEGATRON'S FLAGS", help="of the model and the training")
    add("--hf-config", type=Path, metavar="FILE", help="a Hugging Face config.json")
    add("--model", metavar="NAME", help=f"{' or '.join(map(repr, TABLE_2))} of the re-evaluation")
    add("--seq-length", type=int, metavar="S", help="with --hf-config: tokens of a sequence")
    add("--global-batch", type=int, metavar="B", help="sequences of an iteration")
    add("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    add("--gpus", type=int, metavar="N", help="how many")
    add("--gpus-per-node", type=int, metavar="N", help="default: as many as its machines have")
    add("--cluster", type=Path, metavar="FILE", help="a cluster file (docs/planning/README.md)")
    add("--profile", metavar="FILE", help="of python -m megatron_bpipe profile, or: table-5")
    add("--attention", metavar="LIST", help="of none, recompute, flash, full (default: all)")
    add("--even-layers", action="store_true", help="the same number of layers on every stage")
    add("--check", action="store_true", help="published runs beside predictions, then stop")
    add("--top", type=int, default=5, metavar="K", help="plans to show (default 5)")
    add("--script", default="pretrain_gpt.py", help="for the command (default pretrain_gpt.py)")
    report = parser.add_argument_group("or from a run that was measured with --bpipe-report DIR")
    report.add_argument("--from-report", type=Path, metavar="DIR", help="with its memory.json")
    report.add_argument("--memory", metavar="SIZE", help="of a stage (default: its GPU's)")
    report.add_argument("--microbatches", type=int, metavar="M", help="of an iteration")
    add("--json", action="store_true", help="print JSON instead of text")
