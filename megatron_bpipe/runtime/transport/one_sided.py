"""The evictor's end of every transport that needs nobody at the other end.

    shm     memory that the paired process lends         (shared_memory.py)
    host    this process's own host memory               (host.py)
    ipc     memory of the paired process's GPU           (cuda/ipc.py)

They differ in where the memory comes from (`Memory`) and in who copies (`Copies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_bpipe.runtime.activation import padded
from megatron_bpipe.runtime.transport.base import TransferHandle
from megatron_bpipe.runtime.transport.copies import Copies
from megatron_bpipe.runtime.transport.pool_allocator import Extent, Room
from megatron_bpipe.schedule.ops import ActivationKey


class Memory(Protocol):
    """A pool, and more where it is too small; flat uint8 tensors."""

    def first(self) -> torch.Tensor:
        """The pool; called at the first eviction, may wait for whoever lends it."""

    def more(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes beside what there is."""

    def check(self) -> None:
        """Raise `TransportError` if whoever lends the pool is gone."""

    @property
    def hosted_bytes(self) -> int:
        """Bytes of this process's own host memory among all that."""

    def close(self) -> None:
        """Let all of it go; nobody uses a tensor of it any more."""


class OneSidedTransport:
    """Keeps the books of a pool and copies to and from it; see `Transport`.

    Args:
        pair: the pair's name, for messages.
        memory: where evicted bytes lie.
        copies: what moves them.
    """

    def __init__(self, pair: str, memory: Memory, copies: Copies) -> None:
        self.pair = pair
        self._memory = memory
        self._copies = copies
        self._segments: list[torch.Tensor] = []
        self._room = Room()

    def evict(self, key: ActivationKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """See `Transport`.

        Raises:
            TransportError: whoever lends the pool is gone, or there is no memory for more.
        """
        self._memory.check()
        extent = self._take(key, sum(padded(p.numel()) for p in pieces))
        slot = self._slot(extent, pieces)
        return self._copies.start(f"E{key} to {self.pair}", slot, pieces)

    def load(self, key: ActivationKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """See `Transport`."""
        slot = self._slot(self._room.taken[key], pieces)
        return self._copies.start(f"L{key} from {self.pair}", pieces, slot)

    def release(self, key: ActivationKey) -> None:
        """See `Transport`.

        Whoever gets this room next is copied after this load: copies keep their order.
        """
        self._room.give_back(key)

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return self._room.occupied

    @property
    def hosted_bytes(self) -> int:
        """See `Transport`."""
        return self._memory.hosted_bytes

    def close(self) -> None:
        """See `Transport`."""
        self._copies.close()
        self._segments.clear()
        self._memory.close()

    def _take(self, key: ActivationKey, size: int) -> Extent:
        if not self._segments:
            self._add(self._memory.first())
        extent = self._room.take(key, size)
        if extent is None:
            self._add(self._memory.more(size))
            extent = self._room.take(key, size)
        assert extent is not None
        return extent

    def _add(self, segment: torch.Tensor) -> None:
        self._segments.append(segment)
        self._room.add_segment(segment.numel())

    def _slot(self, extent: Extent, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        segment, at, slot = self._segments[extent.segment], extent.start, []
        for piece in pieces:
            slot.append(segment[at : at + piece.numel()])
            at += padded(piece.numel())
        return slot
