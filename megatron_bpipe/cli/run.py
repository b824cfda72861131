"""``run``: start a training script of Megatron with BPipe installed in its process.

torchrun --nproc-per-node 8 -m megatron_bpipe run pretrain_gpt.py --bpipe ...
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Run the script in this process; it ends the process itself if it fails."""
    from megatron_bpipe.integration.log import abort

    if not Path(args.script).is_file():  # here, before torch is imported
        abort(
            f"no training script at {args.script!r} (looked from {os.getcwd()}): give the path of "
            "Megatron-LM's pretrain_gpt.py, or of this project's scripts/examples/pretrain_gpt.py "
            "where only the megatron-core wheel is installed"
        )
    from megatron_bpipe.integration.bootstrap.run_script import run_script

    run_script(args.script, args.rest)
    return 0
