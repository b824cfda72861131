"""Run a training script of Megatron with BPipe installed in its process.

This is what ``python -m megatron_bpipe run pretrain_gpt.py ...`` does in each process
that torchrun starts. The script itself is not changed.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

from megatron_bpipe.integration import cpu
from megatron_bpipe.integration.bootstrap import dataset_helpers
from megatron_bpipe.integration.bootstrap.copy_queues import ask_for_copy_queues, ask_for_one_queue
from megatron_bpipe.integration.checks.driver import why_unusable
from megatron_bpipe.integration.install import install
from megatron_bpipe.integration.log import abort


def run_script(script: str, argv: list[str]) -> None:
    """Run ``script`` as ``__main__`` with the arguments ``argv``.

    The script's folder comes first on the path, as if Python had been started with it:
    a checkout's own ``megatron`` is then used, not an installed wheel's. Where there is
    no CUDA device, the CPU stands in for it.

    Raises:
        SystemExit: a GPU that torch cannot use.
    """
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *argv]
    if "--bpipe" in argv:  # here, since the next question starts CUDA
        said = ask_for_one_queue(argv)
        if said is not None and int(os.environ.get("RANK", "0")) == 0:
            sys.stderr.write(f"bpipe: {said}\n")
        ask_for_copy_queues()
    if not torch.cuda.is_available():
        unusable = why_unusable()
        if unusable is not None:
            abort(unusable)
        cpu.install()
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stderr.write(cpu.announcement() + "\n")
    dataset_helpers.install()
    install()
    runpy.run_path(script, run_name="__main__")
