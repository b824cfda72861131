"""How fast a transport is, measured through the transport itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from megatron_bpipe.runtime.transport.base import TransferHandle, Transport
from megatron_bpipe.schedule.ops import ActivationKey, PartKey

LARGEST = 64 * 2**20
REPEATS = 3
SCRATCH = PartKey(ActivationKey(-1))  # no micro-batch has this number


@dataclass(frozen=True)
class Speed:
    """Bytes per second of one copy of ``size`` bytes, each way."""

    size: int
    out: float
    back: float


def measure(transport: Transport, microbatch_bytes: int, device: torch.device) -> Speed:
    """Copy as much as a micro-batch has, 64 MiB at most, out and back; the first time warms up.

    Only for transports that need nobody at the other end.
    """
    size = max(1, min(LARGEST, microbatch_bytes))
    scratch = torch.zeros(size, dtype=torch.uint8, device=device)
    out, back = [], []
    for _ in range(1 + REPEATS):
        out.append(_seconds(transport.evict(SCRATCH, [scratch])))
        back.append(_seconds(transport.load(SCRATCH, [scratch])))
        transport.release(SCRATCH)
    return Speed(size, size / statistics.median(out[1:]), size / statistics.median(back[1:]))


def _seconds(transfer: TransferHandle) -> float:
    transfer.wait()
    start, end = transfer.span
    return max(end - start, 1e-9)
