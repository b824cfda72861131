"""Pinning host memory where it lies.

Not ``pin_memory=True``: torch's allocator of pinned memory rounds up to a power of two, which for
a pool may be twice its size, and never gives it back.
"""

from __future__ import annotations

import torch

from megatron_bpipe.runtime.transport.base import TransportError
from megatron_bpipe.runtime.transport.cuda import driver


def pin(segment: torch.Tensor, pair: str) -> None:
    """Let the GPU's copy engines reach ``segment``.

    Raises:
        TransportError: the driver does not pin it.
    """
    try:
        driver.pin(segment.data_ptr(), segment.numel())
    except driver.DriverError as error:
        raise TransportError(
            f"pair {pair}: {segment.numel()} bytes of host memory cannot be pinned ({error}); "
            "lower what other ranks pin, or use a larger --bpipe-budget"
        ) from error


def unpin(segment: torch.Tensor) -> None:
    """Undo `pin`; the memory may be given back then."""
    driver.unpin(segment.data_ptr())
