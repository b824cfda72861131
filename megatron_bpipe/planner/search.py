"""Find the best plans, exactly: best bound first, simulate until no bound can beat what was found.

Every candidate that fits gets a bound on its MFU (no stage faster than its own work, plus fill and
drain).  Candidates are simulated in the order of their bounds; once the next bound is below the
worst plan kept, the rest cannot do better.  That is done for each way to run by itself, so that the
best BPipe plan is known even where others win.

Units: seconds, MFU in per cent, GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.planner.evaluate import (
    Candidate,
    Memory,
    Predictor,
    least_seconds,
    mfu_of,
    seconds_of,
)
from megatron_bpipe.planner.space import Question, Refused, shapes, ways

KEPT = {"yes": 3, "borderline": 1}
"""Plans kept of each way, by whether they fit."""


@dataclass(frozen=True)
class Plan:
    """A candidate with what it is predicted to do."""

    candidate: Candidate
    memory: Memory
    seconds: float
    mfu: float

    @property
    def way(self) -> str:
        """How its pipeline runs."""
        return way_of(self.candidate.run)


@dataclass(frozen=True)
class Found:
    """What a search found.

    ``best`` all plans kept, best first; ``too_large`` for each way and attention the candidate that
    would have been the fastest had it fitted (its bound as MFU); ``slower`` how many fitted and
    were not kept; ``reasons`` why shapes were not looked at.
    """

    best: tuple[Plan, ...]
    too_large: tuple[TooLarge, ...]
    slower: int
    looked_at: int
    reasons: dict[str, int] = field(default_factory=dict)

    def best_of(self, *named: str) -> Plan | None:
        """The best plan that runs in one of these ways (none named: in any), sure to fit if any."""
        plans = [plan for plan in self.best if not named or plan.way in named]
        sure = [plan for plan in plans if plan.memory.fits == "yes"]
        return next(iter(sure or plans), None)


@dataclass(frozen=True)
class TooLarge:
    """The most promising candidate of a way and attention that does not fit, of ``count``."""

    candidate: Candidate
    memory: Memory
    most_mfu: float
    count: int


def search(question: Question, predictor: Predictor) -> Found:
    """All shapes in all ways.

    Raises EstimateError where nothing could be looked at, with the reasons.
    """
    refused = Refused()
    fitting: dict[str, list[tuple[float, Candidate, Memory]]] = {}
    too_large: dict[tuple[str, str], TooLarge] = {}
    looked_at = 0
    for shape in shapes(question, refused):
        for candidate, memory in ways(question, shape, predictor, refused):
            looked_at += 1
            run = candidate.run
            bound = mfu_of(candidate, least_seconds(candidate, predictor))
            way = way_of(run)
            if memory.fits != "no":
                fitting.setdefault(way, []).append((bound, candidate, memory))
                continue
            key = (way, run.attention)
            known = too_large.get(key)
            count = known.count + 1 if known else 1
            if known is None or bound > known.most_mfu:
                too_large[key] = TooLarge(candidate, memory, bound, count)
            else:
                too_large[key] = replace(known, count=count)
    if not looked_at:
        why = "; ".join(f"{reason} ({n})" for reason, n in refused.reasons().items())
        raise EstimateError(f"nothing to plan: {why or 'no shape divides as it must'}")
    best = [plan for group in fitting.values() for plan in _best(group, predictor)]
    best.sort(key=lambda plan: -plan.mfu)
    total = sum(map(len, fitting.values()))
    return Found(
        tuple(best),
        tuple(sorted(too_large.values(), key=lambda t: -t.most_mfu)),
        total - len(best),
        looked_at,
        refused.reasons(),
    )


def evaluate(candidate: Candidate, memory: Memory, predictor: Predictor) -> Plan:
    """A candidate, simulated."""
    seconds = seconds_of(candidate, predictor)
    return Plan(candidate, memory, seconds, mfu_of(candidate, seconds))


def way_of(run: Run) -> str:
    """``1F1B``, ``interleaved``, ``BPipe`` or ``host offload``."""
    if run.bpipe:
        return "BPipe"
    if run.host:
        return "host offload"
    return "interleaved" if run.chunks > 1 else "1F1B"


def _best(group: Sequence[tuple[float, Candidate, Memory]], predictor: Predictor) -> list[Plan]:
    """The best few of those that run in one way, and the best of those that are borderline."""
    kept: list[Plan] = []
    for fits, most in KEPT.items():
        plans: list[Plan] = []
        for bound, candidate, memory in sorted(group, key=lambda item: -item[0]):
            if memory.fits != fits:
                continue
            if len(plans) >= most and bound <= plans[-1].mfu:
                break
            plans.append(evaluate(candidate, memory, predictor))
            plans = sorted(plans, key=lambda plan: -plan.mfu)[:most]
        kept += plans
    return kept
