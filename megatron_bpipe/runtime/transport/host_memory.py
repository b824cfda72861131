"""Host memory for activations: asked for in advance, touched in advance."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from megatron_bpipe.runtime.transport.base import TransportError


def available_bytes() -> int | None:
    """Memory this host can still give, None where the kernel does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_available(wanted: int, pair: str) -> None:
    """The kernel would rather kill a process than refuse pages, so look first.

    Raises:
        TransportError: with both numbers.
    """
    available = available_bytes()
    if available is not None and wanted > available:
        raise no_memory(pair, wanted, f"there are {available} bytes available")


def no_memory(pair: str, wanted: int, why: str) -> TransportError:
    """The error of a pool that does not fit."""
    return TransportError(
        f"pair {pair}: no host memory for a pool of {wanted} bytes ({why}); "
        "use a larger --bpipe-budget, a smaller micro-batch or fewer ranks a host"
    )


def anonymous(size: int, pair: str) -> torch.Tensor:
    """``size`` bytes outside malloc, every page touched; given back when the tensor goes.

    Outside malloc, so that what the allocator says is what activations take.

    Raises:
        TransportError: the host has not got them.
    """
    check_available(size, pair)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        raise no_memory(pair, size, str(error)) from error
    return torch.frombuffer(memory, dtype=torch.uint8)
