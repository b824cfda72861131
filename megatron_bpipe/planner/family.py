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
    known: dict[int, Looked | None] = {}

    def memory_at(n: int) -> Memory | None:
        if n not in known:
            known[n] = look(family[n])
        found = known[n]
        return None if found is None else found[1]

    last = len(family) - 1
    first, least = memory_at(0), memory_at(last)
    if first is not None and first.fits == "yes":
        needed = {0}
    elif first is None or least is None:
        needed = set(range(len(family)))
    elif not _may_fit(first, least):
        needed = {last}
    else:
        falls = [a >= b for a, b in zip(first.needed, least.needed, strict=True)]
        needed = _needed(memory_at, len(family), falls)
    seen: set[Verdict] = set()
    for n in sorted(needed):
        memory_at(n)
        found = known[n]
        if found is None:
            continue
        fits = found[1].fits
        if fits == "no" or fits not in seen:
            yield found
        seen.add(fits)
        if fits == "yes":
            return


def _needed(
    memory_at: Callable[[int], Memory | None], count: int, falls: Sequence[bool]
) -> set[int]:
    """Those that bisection looks at for the largest that is borderline and that surely fits.

    ``falls`` says of which stages the memory falls from first to last.
    """
    asked = {0, count - 1}
    wanted: tuple[set[Verdict], ...] = ({"yes", "borderline"}, {"yes"})
    for accepted in wanted:
        low, high = 0, count - 1
        while low <= high:
            middle = (low + high) // 2
            asked.add(middle)
            memory = memory_at(middle)
            if memory is None:
                return set(range(count))
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
