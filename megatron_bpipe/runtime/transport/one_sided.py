"""The evictor's end of every transport that needs nobody at the other end.

    shm     memory that the paired process lends         (shared_memory.py)
    host    this process's own host memory               (host.py)
    ipc     memory of the paired process's GPU           (cuda/ipc.py)

They differ in where the memory comes from (`PoolMemory`) and in who copies (`Copies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_bpipe.runtime.block import ALIGNMENT, padded
from megatron_bpipe.runtime.transport.base import NothingToMove, TransferHandle
from megatron_bpipe.runtime.transport.copies import Copies, Part
from megatron_bpipe.runtime.transport.pool_allocator import Extent, PoolAllocator
from megatron_bpipe.schedule.ops import PartKey

LEAST_GROWTH, MOST_GROWTH = 2 * 2**20, 64 * 2**20


class PoolMemory(Protocol):
    """A pool, and more where it is too small; flat uint8 tensors."""

    def map(self) -> torch.Tensor:
        """The pool; called at the first eviction, may wait for whoever lends it."""

    def grow(self, size: int) -> torch.Tensor:
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

    def __init__(self, pair: str, memory: PoolMemory, copies: Copies) -> None:
        self.pair = pair
        self._memory = memory
        self._copies = copies
        self._segments: list[torch.Tensor] = []
        self._pool = PoolAllocator()
        self._spilled = 0

    def evict(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """See `Transport`.

        Raises:
            TransportError: whoever lends the pool is gone, or there is no memory for more.
        """
        self._memory.check()
        if not pieces:
            return NothingToMove()
        extents = self._take(key, sum(padded(p.numel()) for p in pieces))
        self._spilled += sum(extent.size for extent in extents if extent.segment > 0)
        parts = self._parts(extents, pieces)
        return self._copies.start(f"E{key} to {self.pair}", parts, out=True)

    def load(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """See `Transport`."""
        if not pieces:
            return NothingToMove()
        parts = self._parts(self._pool.taken[key], pieces)
        return self._copies.start(f"L{key} from {self.pair}", parts, out=False)

    def release(self, key: PartKey) -> None:
        """See `Transport`.

        Whoever gets this room next is copied after this load: copies keep their order.
        """
        if key in self._pool.taken:
            self._pool.give_back(key)

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return self._pool.occupied

    @property
    def hosted_bytes(self) -> int:
        """See `Transport`."""
        return self._memory.hosted_bytes

    @property
    def spilled_bytes(self) -> int:
        """See `Transport`."""
        return self._spilled

    def close(self) -> None:
        """See `Transport`."""
        self._copies.close()
        self._segments.clear()
        self._memory.close()

    def _take(self, key: PartKey, size: int) -> list[Extent]:
        if not self._segments:
            self._add(self._memory.map())
        missing = self._pool.missing(size)
        if missing:  # somewhat more: where one is too large others will be
            least = max(LEAST_GROWTH, min(self._segments[0].numel() // 8, MOST_GROWTH))
            self._add(self._memory.grow(max(missing, least)))
        return self._pool.take(key, size)

    def _add(self, segment: torch.Tensor) -> None:
        self._segments.append(segment)
        self._pool.add_segment(segment.numel() // ALIGNMENT * ALIGNMENT)

    def _parts(self, extents: Sequence[Extent], pieces: Sequence[torch.Tensor]) -> list[Part]:
        """Where ``pieces`` lie in the pool: one after the other, cut where an extent ends."""
        parts: list[Part] = []
        left = list(reversed(extents))
        used = 0  # bytes of left[-1]
        for piece in pieces:
            size, begin = piece.numel(), 0
            while begin < size:
                extent = left[-1]
                part = min(extent.size - used, size - begin)
                segment = self._segments[extent.segment]
                parts.append(Part(segment, extent.start + used, piece, begin, part))
                begin += part
                used += padded(part)
                if used == extent.size:
                    left.pop()
                    used = 0
        return parts
