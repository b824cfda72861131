"""The CPU backend: Megatron's real training loop on machines without a GPU.

Megatron-LM has no CPU mode: its training loop names ``torch.cuda`` and
``device="cuda"`` throughout. :func:`install` makes those names mean the CPU for
this process, so that the unmodified loop, schedule and optimizer run over gloo.
It changes where things run, never what is computed, and is repeatable bit by bit
at a fixed number of threads.

``torch.cuda.is_available()`` keeps saying ``False``. It is the truth, and torch
itself asks it before it pins memory, autocasts or seeds; the one place where
Megatron insists (``initialize_megatron``) has a parameter for it.
"""

import os
import sys

import torch

from megatron_bpipe.integration.cpu import (
    allocator,
    defaults,
    eager,
    extensions,
    megatron_patches,
    memory,
    placement,
    rng,
    streams,
)
from megatron_bpipe.integration.cpu.flags import cpu_flags

__all__ = ["announcement", "cpu_flags", "install", "installed"]

_installed = False


def install() -> None:
    """Let the CPU stand in for CUDA in this process; once is enough.

    Raises:
        RuntimeError: a CUDA device is present, or Megatron was imported already: it
            binds some of the functions replaced here by name when it is imported.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"the CPU backend was asked for, but torch.cuda.is_available() is True "
            f"({torch.cuda.device_count()} device(s)): it is only for machines without a GPU. "
            "Train on the GPU, or hide it with CUDA_VISIBLE_DEVICES= (empty)."
        )
    early = sorted(name for name in sys.modules if name.partition(".")[0] == "megatron")
    if early:
        raise RuntimeError(
            f"the CPU backend must be installed before Megatron is imported, but "
            f"{early[0]!r} and {len(early) - 1} more of its modules are loaded. Call "
            "megatron_bpipe.integration.cpu.install() first, or start the script with "
            "python -m megatron_bpipe run."
        )
    # Megatron asserts this with TP or CP > 1 (training/arguments.py, "using tensor model
    # parallelism or context parallelism require setting CUDA_DEVICE_MAX_CONNECTIONS to 1").
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    allocator.install()
    eager.install()
    extensions.install()
    placement.install()
    streams.install()
    rng.install()
    memory.install()
    megatron_patches.install()
    defaults.install()
    _installed = True


def installed() -> bool:
    """Tell whether the CPU stands in for CUDA in this process."""
    return _installed


def announcement() -> str:
    """Return the line that tells a user that this run is on the CPU."""
    return (
        "bpipe: no CUDA device: the CPU stands in for CUDA in this run "
        f"({torch.get_num_threads()} thread(s) a process); "
        "memory and speed are not those of a GPU"
    )
