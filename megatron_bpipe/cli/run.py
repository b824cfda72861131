"""``run``: start a training script of Megatron with BPipe installed in its process.

torchrun --nproc-per-node 8 -m megatron_bpipe run pretrain_gpt.py --bpipe ...
"""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Run the script in this process; it ends the process itself if it fails."""
    from megatron_bpipe.integration.bootstrap.run_script import run_script

    run_script(args.script, args.rest)
    return 0
