"""Pinning host memory where it lies.

Not ``pin_memory=True``: torch's allocator of pinned memory rounds up to a power of two, which for
a pool may be twice its size, and never gives it back.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_bpipe.runtime.transport.base import TransportError
from megatron_bpipe.runtime.transport.cuda import driver

PCI_DEVICES = Path("/sys/bus/pci/devices")


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


def processors_near(device: torch.device) -> set[int]:
    """Processors on the NUMA node that ``device`` is attached to; empty where it is not known."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    try:
        address = driver.pci_address(index).lower()
        listed = (PCI_DEVICES / address / "local_cpulist").read_text(encoding="ascii").strip()
    except (OSError, driver.DriverError):  # a virtual machine may hide the bus
        return set()
    near: set[int] = set()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        near.update(range(int(first), int(last or first) + 1))
    return near
