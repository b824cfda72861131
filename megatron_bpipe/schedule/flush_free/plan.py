"""What one stage runs in one call of a schedule without a flush; cached, since calls repeat.

Calls are numbered from the last flush on.  After the first few, and before the last few that run
nothing ahead, a call is like the one before with all micro-batches and versions moved on.  So a
short run of few iterations has every kind of call there is, and each is proved there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec
from megatron_bpipe.schedule.bases.pipedream import WithoutFlush
from megatron_bpipe.schedule.flush_free.balanced import Patterns, balanced_run, patterns
from megatron_bpipe.schedule.flush_free.calls import Calls, lowered_calls
from megatron_bpipe.schedule.ops import ActivationKey, Kind, Loan, Op, Schedule
from megatron_bpipe.schedule.stage_plan import StagePlan
from megatron_bpipe.schedule.validation.occupancy import loans_of


@dataclass(frozen=True)
class CallPlan:
    """One stage's part of one call.

    Attributes:
        stage: the ops and what goes with them.
        number: of the call since the last flush; versions count from 0 there too, so this is the
            newest version while the call runs.
        first: the number of its iteration's first micro-batch.
        oldest: the oldest version that a later call needs; ``number + 1`` if none of those that
            exist now.
        flushes: whether the pipeline is empty when the call ends, on all stages.
        carried: micro-batches whose forward has run and whose backward has not, when it ends.
        leaving: those of them that a later call evicts.
    """

    stage: StagePlan
    number: int
    first: int
    oldest: int
    flushes: bool
    carried: frozenset[ActivationKey]
    leaving: frozenset[ActivationKey]


def horizon(spec: ScheduleSpec) -> int:
    """How many calls before a flush must know of it."""
    calls = max(_without_flush(spec).lag(spec.p, stage) for stage in range(spec.p)) + 1
    return max(calls, _patterns(spec).horizon) if spec.balanced else calls


def versions_kept(spec: ScheduleSpec, stage: int) -> int:
    """Most versions of its weights that a stage keeps."""
    return _without_flush(spec).lag(spec.p, stage) + 1


def call_plan(spec: ScheduleSpec, stage: int, number: int, left: int) -> CallPlan:
    """What ``stage`` runs in a call.

    Args:
        spec: the schedule; ``m`` are the micro-batches of one iteration.
        stage: of ``spec.p``.
        number: calls since the last flush.
        left: calls still to come before the next flush; 0: this one ends empty.

    Raises:
        ValueError: for sizes that the schedule does not work with.
    """
    far = horizon(spec)
    before, after = min(number, far), min(left, far)
    return _shifted(_call(spec, stage, before, after), number - before, spec.m)


@lru_cache(maxsize=256)
def _call(spec: ScheduleSpec, stage: int, before: int, after: int) -> CallPlan:
    """Call ``before`` of ``before + 1 + after``."""
    schedule, calls = _run(spec, before + 1 + after)
    ops = calls[before][stage]
    later = [op for call in calls[before + 1 :] for op in call[stage]]
    begun = {op.key for call in calls[: before + 1] for op in call[stage] if _is(op, Kind.FORWARD)}
    ended = {op.key for call in calls[: before + 1] for op in call[stage] if _is(op, Kind.BACKWARD)}
    carried = frozenset(begun - ended)
    leaving = carried & {op.key for op in later if _is(op, Kind.EVICT)}
    needed = [op.version for op in later if op.version is not None and op.kind.computation]
    loans = _loans(spec)
    plan = StagePlan(
        name=spec.name,
        ops=ops,
        chunks=1,
        budget=schedule.budget,
        labelled=_labelled(calls),
        borrows=tuple(loan for loan in loans if loan.evictor == stage),
        lends=tuple(loan for loan in loans if loan.lender == stage),
    )
    return CallPlan(
        stage=plan,
        number=before,
        first=before * spec.m,
        oldest=min([*needed, before + 1]),
        flushes=after == 0,
        carried=carried,
        leaving=leaving,
    )


@lru_cache(maxsize=16)
def _run(spec: ScheduleSpec, iterations: int) -> tuple[Schedule, Calls]:
    schedule = whole_run(spec, iterations)
    return schedule, lowered_calls(schedule, spec.m)


def whole_run(spec: ScheduleSpec, iterations: int) -> Schedule:
    """The logical schedule from one flush to the next, balanced if the specification says so.

    Raises:
        ValueError: for sizes that the schedule does not work with; `BudgetError` for a budget that
            is too small.
    """
    schedule = _without_flush(spec).run(spec.p, spec.m, iterations)
    return balanced_run(schedule, _patterns(spec), spec.m) if spec.balanced else schedule


@lru_cache(maxsize=16)
def short_runs(spec: ScheduleSpec) -> tuple[Schedule, ...]:
    """Runs of 1, 2, ... iterations, up to one that has every kind of call there is.

    Raises ValueError and `BudgetError` as `whole_run` does.
    """
    return tuple(whole_run(spec, n) for n in range(1, 2 * horizon(spec) + 2))


@lru_cache(maxsize=16)
def _patterns(spec: ScheduleSpec) -> Patterns:
    run = partial(_without_flush(spec).run, spec.p, spec.m)
    calls = horizon(replace(spec, balanced=False))
    return patterns(run, spec.m, 6 * calls + 1, spec.budget)


@lru_cache(maxsize=16)
def _loans(spec: ScheduleSpec) -> tuple[Loan, ...]:
    """What is lent in any run: pools stay the same from call to call."""
    if not spec.balanced:
        return ()
    most: dict[tuple[int, int], int] = {}
    for run in short_runs(spec):
        for loan in loans_of(run):
            pair = loan.evictor, loan.lender
            most[pair] = max(most.get(pair, 0), loan.slots)
    return tuple(Loan(*pair, slots) for pair, slots in most.items())


def _without_flush(spec: ScheduleSpec) -> WithoutFlush:
    found = CATALOGUE[spec.name].without_flush
    if found is None:
        raise ValueError(f"schedule {spec.name!r} ends every iteration with a flush")
    return found


def _shifted(plan: CallPlan, calls: int, m: int) -> CallPlan:
    """The same so many calls later."""
    if not calls:
        return plan

    def later(op: Op) -> Op:
        version = None if op.version is None else op.version + calls
        return op._replace(microbatch=op.microbatch + calls * m, version=version)

    def moved(keys: frozenset[ActivationKey]) -> frozenset[ActivationKey]:
        return frozenset(key._replace(microbatch=key.microbatch + calls * m) for key in keys)

    return CallPlan(
        stage=replace(plan.stage, ops=tuple(map(later, plan.stage.ops))),
        number=plan.number + calls,
        first=plan.first + calls * m,
        oldest=plan.oldest + calls,
        flushes=plan.flushes,
        carried=moved(plan.carried),
        leaving=moved(plan.leaving),
    )


def _labelled(calls: Calls) -> bool:
    return any(op.label is not None for stage in calls[0] for op in stage)


def _is(op: Op, kind: Kind) -> bool:
    return op.kind is kind


def text(ops: Sequence[Op]) -> str:
    """Ops for people, one line."""
    return " ".join(map(str, ops))
