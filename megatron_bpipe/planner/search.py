"""Find the best plans, exactly: best bound first, simulate until no bound can beat what was found.

Every candidate that fits gets a bound on its MFU (no stage faster than its own work, plus fill and
drain).  Candidates are simulated in the order of their bounds; once the next bound is below the
worst plan kept, the rest cannot do better.  That is done for each way to run by itself, so that the
best BPipe plan is known even where others win.

Units: seconds, MFU in per cent, GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.planner.evaluate import (
    Candidate,
    Memory,
    Predictor,
    least_seconds,
    mfu_of,
    seconds_of,
)
from megatron_bpipe.planner.space import Question, Refused, shapes
from megatron_bpipe.planner.ways import way_of, ways

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
    were not kept; ``reasons`` why shapes were not looked at; ``interrupted``: there is more
    to look at.
    """

    best: tuple[Plan, ...]
    too_large: tuple[TooLarge, ...]
    slower: int
    looked_at: int
    reasons: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

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


@dataclass
class Looked:
    """What the first part of a search collects: what fits, by way, and what does not."""

    fitting: dict[str, list[tuple[float, Candidate, Memory]]] = field(default_factory=dict)
    too_large: dict[tuple[str, str], TooLarge] = field(default_factory=dict)
    number: int = 0
    schedules: set[str] = field(default_factory=set)

    def add(self, candidate: Candidate, memory: Memory) -> None:
        """One more candidate."""
        self.number += 1
        run = candidate.run
        self.schedules.add(run.base)
        bound = mfu_of(candidate, least_seconds(candidate))
        way = way_of(run)
        if memory.fits != "no":
            self.fitting.setdefault(way, []).append((bound, candidate, memory))
            return
        key = (way, run.attention)
        known = self.too_large.get(key)
        count = known.count + 1 if known else 1
        if known is None or bound > known.most_mfu:
            self.too_large[key] = TooLarge(candidate, memory, bound, count)
        else:
            self.too_large[key] = replace(known, count=count)


Progress = Callable[[int, float | None], None]
"""Told how many candidates were looked at and the best MFU found so far (None: none yet)."""


def search(
    question: Question, predictor: Predictor, progress: Progress = lambda number, best: None
) -> Found:
    """All shapes in all ways.

    An interrupt (KeyboardInterrupt) ends it with the best of what has been looked at by then.

    Raises EstimateError where nothing could be looked at, with the reasons.
    """
    refused, looked = Refused(), Looked()
    interrupted = False
    try:
        for shape in shapes(question, refused):
            for candidate, memory in ways(question, shape, predictor, refused):
                looked.add(candidate, memory)
                progress(looked.number, None)
    except KeyboardInterrupt:
        interrupted = True
    asked = question.fixed.schedule
    if not looked.number or (asked and not interrupted and asked not in looked.schedules):
        why = "; ".join(f"{reason} ({n})" for reason, n in refused.reasons().items())
        what = f" with --bpipe-schedule {asked}" if asked else ""
        raise EstimateError(f"nothing to plan{what}: {why or 'no shape divides as it must'}")
    best: list[Plan] = []
    for group in looked.fitting.values():
        try:
            for plan in _best(group, predictor, 1 if interrupted else None):
                best.append(plan)
                progress(looked.number, max(found.mfu for found in best))
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            best += _best(group, predictor, 1)
    best.sort(key=lambda plan: -plan.mfu)
    total = sum(map(len, looked.fitting.values()))
    return Found(
        tuple(best),
        tuple(sorted(looked.too_large.values(), key=lambda t: -t.most_mfu)),
        total - len(best),
        looked.number,
        refused.reasons(),
        interrupted,
    )


def evaluate(candidate: Candidate, memory: Memory, predictor: Predictor) -> Plan:
    """A candidate, simulated."""
    seconds = seconds_of(candidate, predictor)
    return Plan(candidate, memory, seconds, mfu_of(candidate, seconds))


def _best(
    group: Sequence[tuple[float, Candidate, Memory]], predictor: Predictor, simulated: int | None
) -> list[Plan]:
    """The best few of those that run in one way, and the best of those that are borderline.

    ``simulated``: at most so many are, those of the best bounds (None: until it is certain).
    """
    kept: list[Plan] = []
    for fits, most in KEPT.items():
        plans: list[Plan] = []
        mine = sorted((item for item in group if item[2].fits == fits), key=lambda item: -item[0])
        for bound, candidate, memory in mine[:simulated]:
            if len(plans) >= most and bound <= plans[-1].mfu:
                break
            plans.append(evaluate(candidate, memory, predictor))
            plans = sorted(plans, key=lambda plan: -plan.mfu)[:most]
        kept += plans
    return kept
