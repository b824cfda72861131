"""Which bytes of the pool are free: a first-fit allocator over segments. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Extent:
    """``size`` bytes at ``start`` of segment ``segment``."""

    segment: int
    start: int
    size: int


@dataclass
class Room:
    """Free extents of a pool made of segments; the evictor alone keeps the books."""

    free: list[Extent] = field(default_factory=list)
    taken: dict[Hashable, Extent] = field(default_factory=dict)
    segments: int = 0

    def add_segment(self, size: int) -> int:
        """Add ``size`` free bytes; returns the new segment's number."""
        self.free.append(Extent(self.segments, 0, size))
        self.segments += 1
        return self.segments - 1

    def take(self, key: Hashable, size: int) -> Extent | None:
        """Reserve ``size`` bytes for ``key``; None if no free extent is large enough.

        Raises:
            ValueError: ``key`` already has room.
        """
        if key in self.taken:
            raise ValueError(f"micro-batch {key} already has room in the pool")
        for i, gap in enumerate(self.free):
            if gap.size >= size:
                self.taken[key] = Extent(gap.segment, gap.start, size)
                rest = Extent(gap.segment, gap.start + size, gap.size - size)
                self.free[i : i + 1] = [rest] if rest.size else []
                return self.taken[key]
        return None

    def give_back(self, key: Hashable) -> None:
        """Free what ``key`` holds and merge it with its free neighbours."""
        merged: list[Extent] = []
        gaps = sorted([*self.free, self.taken.pop(key)], key=lambda e: (e.segment, e.start))
        for gap in gaps:
            last = merged[-1] if merged else None
            if last and last.segment == gap.segment and last.start + last.size == gap.start:
                merged[-1] = Extent(last.segment, last.start, last.size + gap.size)
            else:
                merged.append(gap)
        self.free = merged

    @property
    def occupied(self) -> int:
        """Bytes reserved now."""
        return sum(e.size for e in self.taken.values())
