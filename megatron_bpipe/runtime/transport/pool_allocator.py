"""Which bytes of the pool are free: an allocator over segments. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """``size`` bytes at ``start`` of segment ``segment``."""

    segment: int
    start: int
    size: int


@dataclass
class PoolAllocator:
    """Free extents of a pool made of segments; the evictor alone keeps the books.

    What is reserved lies in one extent where a free one is large enough, otherwise in several:
    free bytes are never too scattered to be used. Earlier segments are filled first, since later
    ones are what had to be added and may be slower.
    """

    free: list[Extent] = field(default_factory=list)  # in order, never two neighbours
    taken: dict[Hashable, list[Extent]] = field(default_factory=dict)
    segments: int = 0

    def add_segment(self, size: int) -> None:
        """Add ``size`` free bytes."""
        self.free.append(Extent(self.segments, 0, size))
        self.segments += 1

    def missing(self, size: int) -> int:
        """How many bytes less than ``size`` are free."""
        return max(0, size - sum(gap.size for gap in self.free))

    def take(self, key: Hashable, size: int) -> list[Extent]:
        """Reserve ``size`` bytes for ``key``.

        Raises:
            ValueError: ``key`` already has room, or there are not so many free bytes.
        """
        if key in self.taken:
            raise ValueError(f"{key} already has room in the pool")
        if self.missing(size):
            raise ValueError(f"{size} bytes wanted, {self.missing(size)} of them are not free")
        first = self.free[0].segment if self.free else 0
        whole = [gap for gap in self.free if gap.segment == first and gap.size >= size]
        taken: list[Extent] = []
        for gap in whole[:1] or list(self.free):
            part = min(gap.size, size)
            if part == 0:
                break
            taken.append(Extent(gap.segment, gap.start, part))
            rest = Extent(gap.segment, gap.start + part, gap.size - part)
            at = self.free.index(gap)
            self.free[at : at + 1] = [rest] if rest.size else []
            size -= part
        self.taken[key] = taken
        return taken

    def give_back(self, key: Hashable) -> None:
        """Free what ``key`` holds and merge it with its free neighbours."""
        merged: list[Extent] = []
        for gap in sorted([*self.free, *self.taken.pop(key)]):
            last = merged[-1] if merged else None
            if last and last.segment == gap.segment and last.start + last.size == gap.start:
                merged[-1] = Extent(last.segment, last.start, last.size + gap.size)
            else:
                merged.append(gap)
        self.free = merged

    @property
    def occupied(self) -> int:
        """Bytes reserved now."""
        return sum(extent.size for extents in self.taken.values() for extent in extents)
