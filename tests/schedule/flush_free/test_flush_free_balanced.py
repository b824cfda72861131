"""Balanced schedules without a flush: the budget for ever, the same evictions in every call."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import Kind, Schedule, ScheduleError
from megatron_bpipe.schedule.balancing.balance import BudgetError, balance
from megatron_bpipe.schedule.balancing.cyclic import Cycle, cyclic_evictions
from megatron_bpipe.schedule.balancing.min_evictions import Span
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec
from megatron_bpipe.schedule.flush_free import calls as cut
from megatron_bpipe.schedule.flush_free.calls import lowered_calls
from megatron_bpipe.schedule.flush_free.plan import call_plan, horizon, whole_run
from megatron_bpipe.schedule.lowering.answers import with_answers
from megatron_bpipe.schedule.ops import default_budget
from megatron_bpipe.schedule.validation.occupancy import occupancy
from megatron_bpipe.schedule.validation.validate import validate
from megatron_bpipe.simulate.costs import even_costs
from megatron_bpipe.simulate.engine import simulate
from megatron_bpipe.simulate.memory import even_bytes, memory_peaks


def sizes(name: str, p: int, m: int, budget: float | None = None) -> ScheduleSpec:
    m = {"pipedream": 1, "continuous": 1 + m % 3}.get(name, m)
    return ScheduleSpec(name, p, m, balanced=True, budget=budget)


SPECS = st.builds(
    lambda name, p, over: sizes(name, p, p - 1 + over % (2 * p + 2)),
    st.sampled_from(["pipedream-2bw", "pipedream", "continuous"]),
    st.integers(2, 8),
    st.integers(0, 17),
)


def lowered(spec: ScheduleSpec, n: int) -> Schedule:
    """The calls one after the other."""
    whole = whole_run(spec, n)
    calls = lowered_calls(whole, spec.m)
    lines = tuple(tuple(op for call in calls for op in call[x]) for x in range(spec.p))
    return replace(whole, stages=lines, lowered=True)


def moves(ops) -> list[str]:
    """Computations and transfers without their versions."""
    kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.EVICT, Kind.LOAD)
    return [str(op._replace(version=None)) for op in ops if op.kind in kinds]


def test_2bw_by_hand():
    """p = 4, m = 4: what the module's docstring says of stage 0."""
    spec = ScheduleSpec("pipedream-2bw", 4, 4, balanced=True)
    steady = "F11 E11 B8 L9 F12 B9 F13 E13 B10 L11 F14 B11"
    assert " ".join(moves(call_plan(spec, 0, 2, 9).stage.ops)) == steady


@settings(deadline=None, max_examples=25)
@given(spec=SPECS, n=st.integers(1, 6))
def test_the_calls_together_are_a_valid_run_within_the_budget(spec, n):
    """Fill, steady state and drain; `lowered_calls` proves what each call of it needs."""
    whole = whole_run(spec, n)
    validate(whole)
    plain = whole_run(replace(spec, balanced=False), n)
    lowered_calls(whole, spec.m)
    for stage, line in enumerate(whole.stages):
        assert [op for op in line if op.kind.computation] == list(plain.stages[stage])
        assert max(occupancy(line)[0]) <= whole.budget
        calls = [call_plan(spec, stage, t, n - 1 - t) for t in range(n)]
        ops = [op for call in calls for op in call.stage.ops]
        assert moves(ops) == moves(line)


@settings(deadline=None, max_examples=12)
@given(spec=SPECS)
def test_short_runs_stand_for_long_ones(spec):
    """No call need know of a flush beyond the horizon, and steady calls are all alike."""
    far = horizon(spec)
    n = 2 * far + 4
    long = lowered_calls(whole_run(spec, n), spec.m)
    for stage in range(spec.p):
        for t in range(n):
            short = call_plan(spec, stage, t, n - 1 - t).stage.ops
            lines = [[op._replace(label=None) for op in ops] for ops in (long[t][stage], short)]
            assert lines[0] == lines[1], (stage, t)
            begun = {op.key for op in long[t][stage] if op.kind is Kind.FORWARD}
            later = [op for call in long[t + 1 :] for op in call[stage]]
            leaving = begun & {op.key for op in later if op.kind is Kind.EVICT}
            assert leaving <= call_plan(spec, stage, t, n - 1 - t).leaving
        lent = max(occupancy(whole_run(spec, n).stages[stage])[1], default=0)
        assert sum(loan.slots for loan in call_plan(spec, stage, far, 99).stage.borrows) >= lent


@pytest.mark.parametrize(("p", "m"), [(4, 8), (6, 12), (8, 16)])
def test_the_simulator_sees_the_budget_kept_at_no_cost(p, m):
    """Ten iterations in a row, transfers as long as a forward: memory flat, no time lost."""
    spec = ScheduleSpec("pipedream-2bw", p, m, balanced=True)
    budget = default_budget(p)
    costs = even_costs(p, forward=1, backward=2, transfer=1)
    balanced = simulate(lowered(spec, 10), costs)
    plain = simulate(lowered(replace(spec, balanced=False), 10), costs)
    each = even_bytes(p, 1000)  # of a micro-batch's activations
    assert max(memory_peaks(balanced, each)) <= budget * 1000
    assert memory_peaks(plain, each) == [1000 * (p - x) for x in range(p)]
    assert balanced.seconds == plain.seconds


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 16), (8, 64)])
def test_traffic_against_bpipe_with_flushes(p, m):
    """Evictions in an iteration: a little more than with flushes, since it is never empty.

    Stage x must have p-x-budget micro-batches away at each of 2m steps, and one that leaves right
    after its forward and returns right before its backward is away for 2(p-1-x)-2 of them.
    """
    budget = default_budget(p)
    flushed = balance(CATALOGUE["1f1b"].build(p, m)).stages
    spec = ScheduleSpec("pipedream-2bw", p, m, balanced=True)
    for stage in range(p // 2):
        steps = 2 * m * max(0, p - stage - budget)
        steady = count(call_plan(spec, stage, 9, 9).stage.ops)
        assert steady == -(-steps // (2 * (p - 1 - stage) - 2))
        assert count(flushed[stage]) <= steady <= count(flushed[stage]) + 1


def count(ops) -> int:
    return sum(op.kind is Kind.EVICT for op in ops)


@settings(deadline=None, max_examples=60)
@given(d=st.integers(1, 6), m=st.integers(1, 8), need=st.integers(0, 5), more=st.integers(0, 3))
def test_cyclic_plans_keep_need_and_room_with_the_fewest(d, m, need, more):
    """Unrolled over many periods; no long run does with fewer evictions a period."""
    room = need + more
    spans_ = [Span(2 * i, 2 * i + 2 * d + 1) for i in range(m)]
    stays = cyclic_evictions(Cycle(spans_, [need] * (2 * m), room))
    if stays is None:
        assert need > 0
        assert more == 0 or need >= d
        return
    turns = 4 + 2 * d
    away, lent = [0] * (2 * m * turns), [0] * (2 * m * turns)
    for turn in range(turns):
        for stay in stays:
            evict, load = stay.evict + 2 * m * turn, stay.load + 2 * m * turn
            span = spans_[stay.span]
            assert span.start < stay.evict < stay.load < span.end
            for step in range(max(0, evict), min(load + 1, len(lent))):
                lent[step] += 1
                away[step] += evict < step < load
    middle = slice(2 * m * (d + 1), 2 * m * (d + 2))
    assert min(away[middle]) >= need
    assert max(lent[middle]) <= room
    assert len(stays) >= need * 2 * m / max(1, 2 * d - 2)  # each is away for that long at most
    if room >= need + 2:  # then as few as that are enough
        assert len(stays) == -(-need * 2 * m // max(1, 2 * d - 2))


def test_budgets_too_small():
    with pytest.raises(BudgetError) as error:
        whole_run(sizes("pipedream-2bw", 8, 16, budget=4), 3)
    assert error.value.least == 5
    with pytest.raises(BudgetError) as error:
        whole_run(sizes("continuous", 4, 1, budget=2), 3)
    assert error.value.least > 2
    assert whole_run(sizes("continuous", 4, 1), 3).budget == error.value.least


def test_answers_in_another_call_are_refused(monkeypatch):
    """AC and RT belong to the call of their E and L: else the loop's gatherings deadlock."""

    def late(line, over, answers):
        kept.append(answers[-1:])
        before = [one for last in kept[-2:-1] for one in last]
        return with_answers(line, over, [*before, *answers[:-1]])

    kept: list = []
    monkeypatch.setattr(cut, "with_answers", late)
    run = whole_run(ScheduleSpec("pipedream-2bw", 4, 4, balanced=True), 4)
    with pytest.raises(ScheduleError):
        lowered_calls(run, 4)


def test_pools_do_not_change_from_call_to_call():
    spec = ScheduleSpec("pipedream-2bw", 6, 7, balanced=True)
    for stage in range(6):
        plans = [
            call_plan(spec, stage, t, left).stage for t, left in ((0, 0), (0, 9), (3, 9), (5, 1))
        ]
        for one, another in pairwise(plans):
            assert (one.borrows, one.lends) == (another.borrows, another.lends)
    assert call_plan(spec, 0, 3, 9).stage.pool_bytes({0: (10,)}) == 30
