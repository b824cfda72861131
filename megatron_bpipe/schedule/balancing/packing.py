"""Pack each evictor's slots into the rooms of those that lend: the search of `lending`.

Depth first, largest slots first.  Two bounds cut it: each stage's slots must fit in the rooms
together with all larger ones, and all bytes must.  Where all slots are of one size the first bound
is exact, so that the search never goes back; for slots of different sizes it may, and remembers
where it failed.  Packing is hard in general, so it gives up after `STEPS`.

Units: bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megatron_bpipe.schedule.ops import HOST

STEPS = 2000  # far more than any case of up to 8 stages was seen to need
Packed = dict[int, dict[int, int]]  # slots by evictor and lender


class Packing:
    """Depth-first search for the packing that leaves the fewest bytes to the host.

    ``proved`` is False where it gave up: then ``best`` may not be the best there is, or None though
    there is one.
    """

    def __init__(
        self,
        needs: Sequence[tuple[int, int, int]],
        rooms: Mapping[int, int],
        p: int,
        host: bool,
    ) -> None:
        """Search.

        Args:
            needs: (evictor, bytes of a slot, slots), largest slots first.
            rooms: bytes that each lender has.
            p: stages.
            host: whether host memory takes what does not fit.
        """
        self._needs, self._p, self._host = needs, p, host
        self._rooms = dict(rooms)
        self._failed: dict[tuple[int, tuple[int, ...]], float] = {}  # allowance that was too small
        self._steps = 0
        self._bound = math.inf if host else 1.0  # bytes to the host must stay below this
        self.best: Packed | None = None
        self.proved = True
        self._lowest = self._must_leave(0)
        self._search(0, 0, {})

    def _must_leave(self, at: int) -> int:
        """Bytes of the needs from ``at`` on that find no room, at least.

        Of slots of at least s bytes a room takes no more than room // s.
        """
        rooms = self._rooms.values()
        whole = slots = most = 0
        for _, slot, count in self._needs[at:]:
            slots += count
            whole += slot * count
            most = max(most, slot * (slots - sum(room // slot for room in rooms)))
        return max(most, whole - sum(rooms))

    def _search(self, at: int, hosted: int, packed: Packed) -> None:
        if self._done() or hosted + self._must_leave(at) >= self._bound:
            return
        if at == len(self._needs):
            self._bound, self.best = hosted, packed
            return
        state = at, tuple(sorted(self._rooms.values()))
        if self._failed.get(state, -math.inf) >= self._bound - hosted:
            return
        self._steps += 1
        evictor, slot, slots = self._needs[at]
        for where, left in self._spread(evictor, slot, slots):
            if self._steps > STEPS:
                self.proved = False
                return
            for lender, count in where.items():
                self._rooms[lender] -= slot * count
            whole = where | ({HOST: left} if left else {})
            self._search(at + 1, hosted + slot * left, packed | {evictor: whole})
            for lender, count in where.items():
                self._rooms[lender] += slot * count
            if self._done():
                return
        self._failed[state] = self._bound - hosted

    def _done(self) -> bool:
        return self.best is not None and self._bound <= self._lowest

    def _spread(self, evictor: int, slot: int, slots: int) -> Iterator[tuple[dict[int, int], int]]:
        """All ways to spread slots over the lenders, and how many are left for the host.

        The usual partner comes first, then whoever has most room: few lenders, near the usual ones.
        """
        usual = self._p - 1 - evictor
        order = sorted(self._rooms, key=lambda y: (y != usual, -self._rooms[y], y))
        fitting = [self._rooms[y] // slot for y in order]
        after = [sum(fitting[n + 1 :]) for n in range(len(order))]

        def spread(n: int, left: int) -> Iterator[tuple[dict[int, int], int]]:
            if n == len(order) or not left:
                yield {}, left
                return
            for count in range(min(left, fitting[n]), -1, -1):
                if not self._host and left - count > after[n]:
                    break
                for where, rest in spread(n + 1, left - count):
                    yield ({order[n]: count} | where if count else where), rest

        return spread(0, slots)
