"""Activations in parts: least budgets, traffic, the bound in units, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import (
    BudgetError,
    Kind,
    Schedule,
    ScheduleError,
    balance,
    from_csv,
    least_budget,
    lower,
    one_f_one_b,
    slots,
    to_csv,
    validate,
)
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.handshake import check_handshake
from tests.schedule.balancing import own_forward
from tests.schedule.oracle import counts_in_parts, exhaustive_in_parts, lives_in_parts, words


def moved(schedule: Schedule) -> list[float]:
    """Micro-batches that each evictor sends away."""
    stages = schedule.stages[: schedule.p // 2]
    return [sum(op.kind is Kind.EVICT for op in line) / schedule.parts for line in stages]


def assert_bound(schedule: Schedule, units: int) -> None:
    """At no time, whatever the relative timing, does a stage hold more than so many units."""
    p, u = schedule.p, schedule.parts
    lines = [counts_in_parts(line, u) for line in schedule.stages]
    own = [max(here for here, _ in line) for line in lines]
    lent = [max(there for _, there in line) for line in lines]
    for stage in range(p):
        away = lent[p - 1 - stage] if stage != p - 1 - stage else 0
        assert own[stage] + away <= units
    assert not any(lent[p // 2 :])


def test_four_stages_in_two_parts():
    # p=4, budget 3 of two parts: 6 units.  Stage 0 would hold 8 from F3 (step 3) to the first half
    # of B0, 7 in its second half, then 8 again with F4, ...: two must be away, then one.
    #
    #   F0 F1 F2 F3 B0 .  F4 B1 .  F5 B2 . B3 . ...     a backward has two steps
    #    8 units   8  8 7  8  8 7   8  8 7  6
    line = balance(one_f_one_b(4, 6), 3, 2).stages[0]
    assert max(here for here, _ in counts_in_parts(line, 2)) == 6
    whole = [op for op in line if op.kind in (Kind.FORWARD, Kind.BACKWARD) and not op.part]
    assert words(whole).replace("/0", "") == words(one_f_one_b(4, 6).stages[0])


@pytest.mark.parametrize(
    ("p", "m", "u", "least"), [(4, 12, 4, 2.75), (5, 12, 4, 3.25), (8, 24, 4, 4.75)]
)
def test_least_budgets_of_four_parts(p, m, u, least):
    # half of the p + 1 that a pair holds, and one unit in flight
    assert least == (p + 1) / 2 + 1 / u
    assert least_budget(one_f_one_b(p, m), u) == least
    with pytest.raises(BudgetError, match=f"use {least} or more"):
        balance(one_f_one_b(p, m), least - 0.01, u)


@pytest.mark.parametrize(("p", "m"), [(4, 12), (6, 18), (8, 24)])
def test_eight_parts_reach_half_of_what_a_pair_holds(p, m):
    assert least_budget(one_f_one_b(p, m), 8) == (p + 1) / 2


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("p", "m", "u", "budget", "inside"),
    [
        (3, 5, 2, 2.5, 2.5),
        (3, 5, 4, 2.25, 2),
        (4, 8, 2, 3, 3),
        (5, 7, 2, 3.5, 3),
        pytest.param(4, 8, 4, 2.75, 2.5, marks=LONG),
    ],
)
def test_what_leaving_in_the_own_forward_would_gain(p, m, u, budget, inside):
    """docs/balance/parts.md, which says why it is not built: (p+1)/2 from fewer parts."""
    assert least_budget(one_f_one_b(p, m), u) == own_forward.least(p, m, u, inside=False) == budget
    assert own_forward.least(p, m, u, inside=True) == inside


@LONG
def test_how_much_less_would_travel_at_the_published_budget():
    whole, inside = (own_forward.moved(4, 12, 4, 12, inside) for inside in (False, True))
    assert sum(moved(balance(one_f_one_b(4, 12), 3, 4))) == whole == 4
    assert inside == 3


@pytest.mark.parametrize(("p", "m", "less"), [(4, 12, 0.33), (5, 12, 0.25), (8, 24, 0.18)])
def test_less_travels_at_the_published_budget(p, m, less):
    base = one_f_one_b(p, m)
    whole, parts = (sum(moved(balance(base, None, u))) for u in (1, 4))
    assert parts <= (1 - less) * whole


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(1, 22), st.integers(2, 5), st.data())
def test_every_budget_from_the_least_keeps_the_bound(p, m, u, data):
    base = one_f_one_b(p, m)
    least = round(least_budget(base, u) * u)
    units = data.draw(st.integers(least, p * u))
    balanced = balance(base, units / u, u)
    assert_bound(balanced, units)
    lowered = lower(balanced)
    for one in (balanced, lowered):
        validate(one)
        assert from_csv(to_csv(one), parts=u).stages == one.stages
    check_handshake(lowered)


@pytest.mark.parametrize(("p", "u"), [*product((2, 3, 4), (2, 3)), (5, 2)])
def test_nothing_better_exists(p, u):
    # every evictor, m and budget: as good as trying everything, and fails only where that fails
    for m in range(1, p + 2):
        base = one_f_one_b(p, m)
        for units in range(u, u * min(p, m) + 1):
            best = []
            for stage, line in enumerate(base.stages):
                room = units - u * min(m, stage + 1)  # stage p-1-x itself holds min(m, x+1)
                evictor = stage < p // 2
                lives = lives_in_parts(line, u)
                if room < 0 and evictor:
                    best.append(None)
                else:
                    best.append(exhaustive_in_parts(lives, u, units, room if evictor else 0))
            if None in best:
                with pytest.raises(BudgetError):
                    balance(base, units / u, u)
            else:
                found = balance(base, units / u, u)
                assert [round(n * u) for n in moved(found)] == best[: p // 2]


@pytest.mark.parametrize(
    ("p", "chunks", "group", "m", "u"), [(4, 2, None, 8, 2), (4, 2, 5, 9, 4), (4, 3, None, 12, 3)]
)
def test_interleaved_in_parts(p, chunks, group, m, u):
    base = interleaved(p, m, chunks, group)
    least = least_budget(base, u)
    assert least < least_budget(base)
    balanced = balance(base, least, u)
    assert_bound(balanced, round(least * chunks * u))
    validate(lower(balanced))


def test_of_one_activation_the_early_layers_leave_first_and_come_back_last():
    for m, u, budget in product((6, 9), (2, 4), (2.75, 3)):
        if budget * u % 1:
            continue
        for line in balance(one_f_one_b(4, m), budget, u).stages:
            for kind, falling in ((Kind.EVICT, False), (Kind.LOAD, True)):
                by_activation = {}
                for op in line:
                    if op.kind is kind:
                        by_activation.setdefault(op.activation, []).append(op.part)
                for parts in by_activation.values():
                    assert parts == sorted(parts, reverse=falling)
                    assert set(parts) == set(range(len(parts)))


def test_one_part_is_the_published_schedule():
    assert balance(one_f_one_b(8, 20), None, 1) == balance(one_f_one_b(8, 20))


def test_slots_count_units():
    assert slots(balance(one_f_one_b(4, 12), 3, 4), 0) == 6


@pytest.mark.parametrize("parts", [0, -1])
def test_fewer_parts_than_one(parts):
    with pytest.raises(ValueError, match=f"parts is {parts}: .* use 1 to move it whole"):
        balance(one_f_one_b(4, 8), None, parts)


LAST = "F0 B0 F1 B1"


@pytest.mark.parametrize(
    ("line", "index", "reason"),
    [
        ("F0 E0 F1 B0 L0 B1", 1, "E0: activations of this schedule travel in 2 part"),
        ("F0 E0/2 F1 L0/2 B0 B1", 1, "an activation has parts 0 to 1"),
        ("F0/1 F1 B0 B1", 0, "only transfers and backwards have parts"),
        ("F0 F1 B0/1 B1 B0/0", 3, "B1 stands inside a backward: B0/0 is next"),
        ("F0 F1 B0/0 B0/1 B1", 2, "the latest layers come first"),
        ("F0 F1 B0/1 B1/0 B0/0 B1/1", 3, "B1/0 stands inside a backward"),
        ("F0 E0/0 F1 L0/0 B0 B1", 4, "B0 while what F0 left is on its way back"),
        ("F0 E0/0 F1 B0/1 B0/0 L0/0 B1", 4, "B0/0 while what F0 left is remote"),
        ("F0 F1 E0/1 B0/1 B0/0 L0/1 B1", 3, "B0/1 while what F0 left is on its way out"),
        ("F0 F1 B0/1 E0/1 B0/0 B1", 3, "E0/1 while what F0 left is consumed"),
        ("F0 F1 B0 B1/1", None, "B1/0 is missing"),
    ],
)
def test_reasons(line, index, reason):
    stages = from_text(line), from_text(LAST)
    with pytest.raises(ScheduleError) as caught:
        validate(Schedule("test", 2, stages, parts=2))
    assert reason in caught.value.reason
    assert (caught.value.stage, caught.value.index) == (0, index)


def from_text(line):
    from megatron_bpipe.schedule import Op

    return tuple(map(Op.parse, line.split()))


def test_a_load_may_run_into_its_own_backward():
    line = "F0 E0/0 F1 B0/1 L0/0 F2"  # not with another computation between
    with pytest.raises(ScheduleError):
        validate(Schedule("test", 2, (from_text(line), from_text(LAST)), parts=2))
    good = "F0 E0/0 F1 F2 L0/0 B0/1 B0/0 B1 B2"
    validate(Schedule("test", 3, (from_text(good), from_text("F0 B0 F1 B1 F2 B2")), parts=2))
