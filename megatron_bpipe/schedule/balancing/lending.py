"""Who lends how much to whom, from bytes: the exact answer.

Every stage has memory that is there whatever the schedule (``fixed``: parameters, optimizer state,
what computing needs besides), and *ways* to run its activations.  In the first way nothing leaves;
each of the others keeps fewer bytes on the stage and needs slots elsewhere::

    stage      0      1      2      3          a slot is one activation; p = 4, MiB
    fixed     10     10     10     90          the last stage is full of logits
    way 0     40     30     20     10          1F1B: 4, 3, 2, 1 micro-batches of 10
    way 1   30+2s                              3 stay, 2 slots are needed

    lowest peak 100 (stage 3, whatever is done): stage 0 needs nothing then, and nothing moves.
    With the paper's pairs stage 3 would lend 2 slots to stage 0, and end at 120.

A stage that lends evicts nothing: what it would pass on can go to its destination at once.

*Lowest peak*: whether a peak T can be kept is a packing problem.  A stage whose first way fits in T
has that much room; all others must choose a way that fits, and their slots must be packed into the
rooms.  A larger T only makes that easier, so the least T is found by bisection, to the byte.

*Fewest bytes*: with T given, combinations of ways are tried in order of the bytes that they move,
and the first that can be packed is the answer.

Packing is hard in general (`packing`), so it may give up: then the lending is one that can be kept,
but ``proved`` says that a better one was not excluded.

Units: bytes; slots are activations of one chunk.
Paper: section 2.2 has the pairs x, p-1-x, which are best where every stage's bytes are equal.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_bpipe.schedule.balancing.packing import Packed, Packing
from megatron_bpipe.schedule.ops import HOST, Loan

COMBINATIONS = 2000  # of ways that are tried, at most


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a stage.

    Attributes:
        own: bytes of its own activations on the stage at most.
        slots: activations that are elsewhere at most, transfers in flight counted.
        moved: bytes that leave in an iteration; as many come back.
        keep: what makes the schedule of it, see `ways.ways`; of no meaning here.
    """

    own: int
    slots: int = 0
    moved: int = 0
    keep: int = 0


@dataclass(frozen=True, slots=True)
class StageNeed:
    """One stage.

    Attributes:
        fixed: bytes that are there in every way.
        slot: bytes of one slot that holds an activation of this stage, at least 1.
        ways: the first of them moves nothing.
    """

    fixed: int
    slot: int
    ways: tuple[Way, ...]

    @property
    def stock(self) -> int:
        """Its peak where nothing moves and nothing is lent."""
        return self.fixed + self.ways[0].own

    @property
    def least(self) -> int:
        """Its peak in the way that keeps the fewest bytes."""
        return self.fixed + min(way.own for way in self.ways)


@dataclass(frozen=True, slots=True)
class Lending:
    """What is to be done.

    Attributes:
        ways: of each stage.
        loans: in order of evictor, then in the order in which an evictor fills them.
        peaks: of each stage, bytes.
        proved: that nothing is better.
    """

    ways: tuple[Way, ...]
    loans: tuple[Loan, ...]
    peaks: tuple[int, ...]
    proved: bool = True

    @property
    def moved(self) -> int:
        """Bytes that leave their stage in an iteration."""
        return sum(way.moved for way in self.ways)

    @property
    def fullest(self) -> int:
        """The stage with the highest peak."""
        return self.peaks.index(max(self.peaks))


class LimitError(ValueError):
    """No lending keeps every stage below ``limit``; the least that can be kept is ``least``."""

    def __init__(self, limit: int, least: int, stage: int) -> None:
        self.limit, self.least, self.stage = limit, least, stage
        super().__init__(
            f"a limit of {limit} bytes cannot be kept: stage {stage} needs {least}, "
            f"{least - limit} more"
        )


def emptiest(stages: Sequence[StageNeed]) -> Lending:
    """The lending between stages whose highest peak is lowest; of those, the fewest bytes."""
    low, high = max(stage.least for stage in stages), max(stage.stock for stage in stages)
    proved = True
    while low < high:
        middle = (low + high) // 2
        attempt = _leanest(stages, middle)
        if attempt is not None and attempt.packing.best is not None:
            high = middle
        else:
            proved = proved and (attempt is None or attempt.packing.proved)
            low = middle + 1
    found = _fewest(stages, high)
    assert found is not None, "bisection ends at a peak that can be kept"
    return replace(found, proved=found.proved and proved)


def within(stages: Sequence[StageNeed], limit: int, host: bool = True) -> Lending:
    """The lending that keeps every stage within ``limit`` with the fewest bytes moved.

    Host memory takes only what no stage has room for (with ``host``), as little as can be.

    Raises:
        LimitError: it cannot be kept.
    """
    found = _fewest(stages, limit)
    if found is None and host:
        found = _with_host(stages, limit)
    if found is not None:
        return found
    if host:
        worst = max(range(len(stages)), key=lambda x: stages[x].least)
        raise LimitError(limit, stages[worst].least, worst)
    best = emptiest(stages)
    raise LimitError(limit, max(best.peaks), best.fullest)


def on_host(stages: Sequence[StageNeed], limit: int | None = None) -> Lending:
    """The same where nothing is lent and every stage evicts to its own host memory.

    Without a limit the lowest peak there is.

    Raises:
        LimitError: it cannot be kept.
    """
    most = max(stage.least for stage in stages) if limit is None else limit
    for x, stage in enumerate(stages):
        if stage.least > most:
            raise LimitError(most, stage.least, x)
    chosen = [_options(stage, most)[0] for stage in stages]
    packed = {x: {HOST: way.slots} for x, way in enumerate(chosen) if way.slots}
    return _lending(stages, chosen, packed)


def _options(stage: StageNeed, most: int) -> list[Way]:
    """The ways that fit in ``most``, fewest bytes moved first, each with fewer slots."""
    if stage.stock <= most:
        return [stage.ways[0]]
    fitting = [way for way in stage.ways if stage.fixed + way.own <= most]
    out: list[Way] = []
    for way in sorted(fitting, key=lambda way: (way.moved, way.slots, way.own)):
        if not out or way.slots < out[-1].slots:
            out.append(way)
    return out


@dataclass(frozen=True)
class _Attempt:
    """One way a stage, and whether their slots could be packed."""

    chosen: Sequence[Way]
    packing: Packing

    def lending(self, stages: Sequence[StageNeed], proved: bool) -> Lending:
        assert self.packing.best is not None
        return _lending(stages, self.chosen, self.packing.best, proved)


def _leanest(stages: Sequence[StageNeed], most: int, host: bool = False) -> _Attempt | None:
    """The ways with the fewest slots: if they cannot be packed, none can.

    None where a stage has no way that fits in ``most``.
    """
    options = [_options(stage, most) for stage in stages]
    return _attempt(stages, [each[-1] for each in options], most, host) if all(options) else None


def _fewest(stages: Sequence[StageNeed], most: int) -> Lending | None:
    """The combination of ways with the fewest bytes moved that can be packed within ``most``."""
    leanest = _leanest(stages, most)
    if leanest is None or leanest.packing.best is None:
        return None
    proved = True
    options = [_options(stage, most) for stage in stages]
    for chosen in itertools.islice(_by_bytes(options), COMBINATIONS):
        attempt = _attempt(stages, chosen, most)
        if attempt.packing.best is not None:
            return attempt.lending(stages, proved)
        proved = proved and attempt.packing.proved
    return leanest.lending(stages, proved=False)


def _by_bytes(options: Sequence[Sequence[Way]]) -> Iterator[list[Way]]:
    """All combinations of one way a stage, in order of the bytes that they move."""

    def moved(numbers: Sequence[int]) -> int:
        return sum(ways[n].moved for ways, n in zip(options, numbers, strict=True))

    first = (0,) * len(options)
    queue = [(moved(first), first)]
    seen = {first}
    while queue:
        _, numbers = heapq.heappop(queue)
        yield [ways[n] for ways, n in zip(options, numbers, strict=True)]
        for x, n in enumerate(numbers):
            after = (*numbers[:x], n + 1, *numbers[x + 1 :])
            if n + 1 < len(options[x]) and after not in seen:
                seen.add(after)
                heapq.heappush(queue, (moved(after), after))


def _with_host(stages: Sequence[StageNeed], most: int) -> Lending | None:
    """The fewest bytes in host memory, with the ways that need the fewest slots."""
    attempt = _leanest(stages, most, host=True)
    return attempt.lending(stages, attempt.packing.proved) if attempt is not None else None


def _attempt(
    stages: Sequence[StageNeed], chosen: Sequence[Way], most: int, host: bool = False
) -> _Attempt:
    """Pack the slots of these ways; with ``host`` what does not fit goes there, least bytes."""
    evictors = [x for x, way in enumerate(chosen) if way.slots]
    evictors.sort(key=lambda x: (-stages[x].slot, x))
    rooms = {
        y: most - stage.stock
        for y, (stage, way) in enumerate(zip(stages, chosen, strict=True))
        if not way.slots
    }
    needs = [(x, stages[x].slot, chosen[x].slots) for x in evictors]
    return _Attempt(chosen, Packing(needs, rooms, len(stages), host))


def _lending(
    stages: Sequence[StageNeed], chosen: Sequence[Way], packed: Packed, proved: bool = True
) -> Lending:
    """What it comes to."""
    loans = [
        Loan(evictor, lender, count)
        for evictor in sorted(packed)
        for lender, count in sorted(packed[evictor].items(), key=lambda item: item[0] == HOST)
    ]
    peaks = [stage.fixed + way.own for stage, way in zip(stages, chosen, strict=True)]
    for loan in loans:
        if loan.lender != HOST:
            peaks[loan.lender] += loan.slots * stages[loan.evictor].slot
    return Lending(tuple(chosen), tuple(loans), tuple(peaks), proved)
