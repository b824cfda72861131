"""One run at many budgets: which of them to look at.

From one budget to the next smaller one the memory of a stage only falls, if it evicts, or only
grows, if it lends.  So those that fit are neighbours, between two ends that bisection finds::

    budget      9     8     7     6     5     4     3
    evictor   full  full  tight fits  fits  fits  fits
    lender    fits  fits  fits  fits  tight full  full
                          ^     ^ the largest that surely fits
                          the largest that fits or is borderline

Smaller ones than the largest that fits only move more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from megatron_bpipe.estimate.memory.stages import Verdict, verdict
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.planner.evaluate import Candidate, Memory

Family = Sequence[Run]
"""One run, or the same run at each budget, from the largest to the least."""
Looked = tuple[Candidate, Memory]


def tried(family: Family, look: Callable[[Run], Looked | None]) -> Iterator[Looked]:
    """Those of a family that count, in the order of their budgets.

    These are the largest budget that fits and the largest that is borderline, where that is
    larger still; where no budget fits the least stands for the family, since it needs least of the
    fullest stage.  ``look`` returns None where there is no schedule; then all are looked at.
    """
    if not family:
        return

    @cache
    def found_at(n: int) -> Looked | None:
        return look(family[n])

    seen: set[Verdict] = set()
    for n in sorted(_needed(found_at, len(family))):
        found = found_at(n)
        if found is None:
            continue
        fits = found[1].fits
        if fits == "no" or fits not in seen:
            yield found
        seen.add(fits)
        if fits == "yes":
            return


def _needed(found_at: Callable[[int], Looked | None], count: int) -> set[int]:
    """Which of ``count`` say all: the two ends, and what bisection looks at between them."""
    first = found_at(0)
    if first is not None and first[1].fits == "yes":
        return {0}
    least = found_at(count - 1)
    if first is None or least is None:
        return set(range(count))
    if not _may_fit(first[1], least[1]):
        return {count - 1}
    falls = [a >= b for a, b in zip(first[1].needed, least[1].needed, strict=True)]
    asked = {0, count - 1}
    wanted: tuple[set[Verdict], ...] = ({"yes", "borderline"}, {"yes"})
    for accepted in wanted:
        low, high = 0, count - 1
        while low <= high:
            middle = (low + high) // 2
            asked.add(middle)
            found = found_at(middle)
            if found is None:
                return set(range(count))
            memory = found[1]
            refused = {
                fall
                for fall, needed, there in zip(falls, memory.needed, memory.there, strict=True)
                if verdict(needed, there) not in accepted
            }
            if len(refused) == 2:
                break  # one stage wants a smaller budget, another one a larger one
            if True in refused:
                low = middle + 1
            else:  # also where a lender is full
                high = middle - 1
    return asked


def _may_fit(*memories: Memory) -> bool:
    """Whether each stage could fit with the least that these say it needs."""
    needed = tuple(map(min, zip(*(memory.needed for memory in memories), strict=True)))
    return Memory(needed, memories[0].there).fits != "no"
