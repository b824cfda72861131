"""Activities that slow one another down: flows over shared links, computations beside them.

A flow's speed is the least of its link's bandwidth and, with contention, its equal share of each
shared link it occupies.  With tensor-parallel traffic of share u a flow over the fabric and a
computation of a stage at one of its ends each go at 1/(1+u) while they overlap.

Speeds change only when an activity begins or ends: what was done so far is then settled at the old
speeds.  Units: seconds; work in bytes for flows, in seconds for computations.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_bpipe.simulate.network import Network, Path, SharedLink


@dataclass(eq=False)
class _Activity:
    """Something under way; ``places`` are what it shares with others."""

    done: Callable[[], None]
    work: float
    places: tuple[SharedLink, ...]
    path: Path | None  # None: a computation
    speed: float = 0.0
    since: float = 0.0
    version: int = 0


class ContentionModel:
    """All activities under way, and how fast each is."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._at: dict[SharedLink, dict[_Activity, None]] = {}  # ordered sets
        self._heap: list[tuple[float, int, int, _Activity]] = []
        self._count = 0
        self._active = 0

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return self._active > 0

    def compute(self, now: float, stage: int, seconds: float, done: Callable[[], None]) -> None:
        """A computation of this stage begins."""
        places = (("fabric-out", stage), ("fabric-in", stage), ("fabric", stage))
        self._begin(now, _Activity(done, seconds, places, None, since=now))

    def flow(self, now: float, path: Path, size: float, done: Callable[[], None]) -> None:
        """Bytes begin to flow."""
        self._begin(now, _Activity(done, size, path.links, path, since=now))

    def next_over(self, before: float | None) -> tuple[float, Callable[[], None]] | None:
        """End the activity that is over first, unless that is after ``before``."""
        while self._heap and self._heap[0][3].version != self._heap[0][2]:
            heapq.heappop(self._heap)
        if not self._heap or (before is not None and self._heap[0][0] > before):
            return None
        now, _, _, activity = heapq.heappop(self._heap)
        activity.version += 1
        self._active -= 1
        for link in activity.places:
            del self._at[link][activity]
        self._change(now, self._beside(activity))
        return now, activity.done

    def _begin(self, now: float, activity: _Activity) -> None:
        self._active += 1
        for link in activity.places:
            self._at.setdefault(link, {})[activity] = None
        self._change(now, self._beside(activity))

    def _beside(self, activity: _Activity) -> dict[_Activity, None]:
        """All activities on its shared links, itself included while it is under way."""
        return {other: None for link in activity.places for other in self._at[link]}

    def _change(self, now: float, affected: Iterable[_Activity]) -> None:
        """Settle what was done and give each activity its new speed."""
        for activity in affected:
            speed = self._speed(activity)
            if speed == activity.speed and activity.version:
                continue
            if activity.speed < math.inf:
                activity.work = max(0.0, activity.work - activity.speed * (now - activity.since))
            activity.speed, activity.since = speed, now
            activity.version += 1
            self._count += 1
            end = now if activity.work == 0 else now + activity.work / speed
            heapq.heappush(self._heap, (end, self._count, activity.version, activity))

    def _speed(self, activity: _Activity) -> float:
        share = self._network.tp_share
        if activity.path is None:
            flows = any(other.path is not None for other in self._beside(activity))
            return 1 / (1 + share) if flows else 1.0
        speed = activity.path.link.bandwidth
        computing = False
        for link in activity.places:
            here = self._at[link]
            flows_here = sum(other.path is not None for other in here)
            computing = computing or flows_here < len(here)
            if self._network.contention:
                speed = min(speed, activity.path.link.bandwidth / flows_here)
        return speed / (1 + share) if computing else speed
