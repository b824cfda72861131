"""Which copies a recorded iteration waited for, and why they were not hidden.

A copy is hidden if it is over when the computation beside it is. Units: seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.simulate.recorded.recording import Recording, Seen

LONG = "the copy takes longer than what is computed beside it"
ALONE = "nothing is computed beside it"
LATE = "the copy began late, behind another one or until its partner was ready"
WAITED = "the copy was over in time; waiting for it took that long all the same"


@dataclass(frozen=True)
class Exposure:
    """The evictions or the loads of one stage in the recorded iteration.

    ``exposed`` is what the stage waited, all ``count`` copies together; ``copy`` and ``beside`` are
    means: seconds of a copy, seconds computed beside it.
    """

    stage: int
    kind: Kind
    count: int
    exposed: float
    copy: float
    beside: float
    size: float
    why: str


def exposures(recording: Recording) -> list[Exposure]:
    """What was exposed at all, the most first."""
    out = []
    for stage, line in enumerate(recording.stages):
        for kind, wait in ((Kind.EVICT, Kind.EVICT_WAIT), (Kind.LOAD, Kind.LOAD_WAIT)):
            found = _of(stage, line, kind, wait)
            if found is not None and found.exposed > 0:
                out.append(found)
    return sorted(out, key=lambda one: -one.exposed)


def _of(stage: int, line: Sequence[Seen], kind: Kind, wait: Kind) -> Exposure | None:
    begun: dict[object, tuple[float, float, int]] = {}  # by what moves: end of E, computed, bytes
    computed = 0.0
    copies: list[tuple[float, float, float, int, str]] = []
    for seen in line:
        if seen.op.kind.computation:
            computed += seen.end - seen.start
        elif seen.op.kind is kind:
            begun[seen.op.moved] = (seen.end, computed, seen.size)
        elif seen.op.kind is wait and seen.copy is not None and seen.op.moved in begun:
            asked, before, size = begun.pop(seen.op.moved)
            beside, copy = computed - before, seen.copy[1] - seen.copy[0]
            exposed = max(0.0, seen.exposed or 0.0)
            copies.append((exposed, copy, beside, size, _why(seen, asked, copy, beside)))
    if not copies:
        return None
    reasons: dict[str, float] = {}
    for exposed, _, _, _, why in copies:
        reasons[why] = reasons.get(why, 0.0) + exposed
    n = len(copies)
    return Exposure(
        stage,
        kind,
        n,
        sum(c[0] for c in copies),
        sum(c[1] for c in copies) / n,
        sum(c[2] for c in copies) / n,
        sum(c[3] for c in copies) / n,
        max(reasons, key=lambda why: reasons[why]),
    )


def _why(wait: Seen, asked: float, copy: float, beside: float) -> str:
    assert wait.copy is not None
    if beside <= 0:
        return ALONE
    if copy > beside:
        return LONG
    if wait.copy[0] - asked > 0.1 * copy and wait.copy[1] > wait.start:
        return LATE
    return WAITED
