"""The transport without a partner: evicted micro-batches lie in the evictor's own host memory.

For pairs without a fast link, and as the rival of all others. The acceptor lends nothing, so its
memory stays what stock 1F1B needs; the schedule is the same. On CUDA the memory is pinned, so that
copies run beside the computation.
"""

from __future__ import annotations

import mmap

import torch

from megatron_bpipe.runtime.transport.copies import copies_on
from megatron_bpipe.runtime.transport.host.memory import anonymous
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.schedule.ops import PartKey


class HostMemory:
    """This process's own host memory, pinned if activations are on a GPU; see `PoolMemory`.

    Args:
        pair: the pair's name, for messages.
        wanted: bytes of the pool, taken at once; 0 to take what is needed when it is.
        device: where activations are computed.

    Raises:
        TransportError: the host has no memory left, or does not pin it.
    """

    def __init__(self, pair: str, wanted: int, device: torch.device) -> None:
        self._pair = pair
        self._device = device
        self._pinned = device.type == "cuda"
        self._segments: list[torch.Tensor] = []
        if wanted:
            self.grow(wanted)

    def map(self) -> torch.Tensor:
        """See `PoolMemory`."""
        return self._segments[0] if self._segments else self.grow(1)

    def grow(self, size: int) -> torch.Tensor:
        """See `PoolMemory`.

        Raises:
            TransportError: the host has no memory left, or does not pin it.
        """
        size = max(size, mmap.PAGESIZE)
        if self._pinned:
            from megatron_bpipe.runtime.transport.cuda.pinned import pin, processors_near

            segment = anonymous(size, self._pair, processors_near(self._device))
            pin(segment, self._pair)
        else:
            segment = anonymous(size, self._pair)
        self._segments.append(segment)
        return segment

    def check(self) -> None:
        """See `PoolMemory`; it is nobody else's."""

    @property
    def hosted_bytes(self) -> int:
        """See `PoolMemory`."""
        return sum(segment.numel() for segment in self._segments)

    def close(self) -> None:
        """See `PoolMemory`."""
        if self._pinned:
            from megatron_bpipe.runtime.transport.cuda.pinned import unpin

            for segment in self._segments:
                unpin(segment)
        self._segments.clear()


class NoPool:
    """The acceptor's end; see `AcceptorEnd`."""

    pool_bytes = 0
    offer = ""

    def accept(self, key: PartKey) -> None:
        """Nothing comes."""

    def give_back(self, key: PartKey) -> None:
        """Nothing is here."""

    def finish(self) -> None:
        """Nothing can be under way."""

    def forget(self) -> None:
        """Nothing is here."""

    def close(self) -> None:
        """Nothing to free."""


def host_transport(
    pair: str, wanted: int, device: torch.device, deadline: float
) -> OneSidedTransport:
    """The evictor's end.

    Args:
        pair: the pair's name, for messages.
        wanted: bytes of the pool.
        device: where activations are computed.
        deadline: seconds that one copy may take.
    """
    return OneSidedTransport(pair, HostMemory(pair, wanted, device), copies_on(device, deadline))
