"""The balance pass: the bound always holds, with the fewest transfers."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import (
    BudgetError,
    Kind,
    Op,
    Schedule,
    balance,
    default_budget,
    least_budget,
    lower,
    one_f_one_b,
    slots,
    validate,
)
from megatron_bpipe.schedule.balancing.min_evictions import Span, fewest_evictions
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.ops import quantity
from tests.schedule import oracle
from tests.schedule.oracle import assert_bound, evictions, exhaustive, least_cover, lives_of, words


def test_four_stages_eight_microbatches():
    # Stage 0 may hold 3 and lends nothing; stage 3 holds 1 and lends up to 2 slots.
    # Live count of stage 0 is 4 during F3 ... B4 (steps 3-12): one must be away at each of them.
    #
    #   step   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
    #         F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7
    #               E1 .. .. L1                                 away 3-4: newest before step 2 is 1
    #                     E3 .. .. .. .. L3                     away 5-8: newest before step 4 is 3
    #                                 E5 .. .. .. L5            away 9-11, L5 the step before B5
    #                                          E6 .. L6         away 12: F7 itself runs at 11
    balanced = balance(one_f_one_b(4, 8))
    assert [words(line) for line in balanced.stages] == [
        "F0 F1 E1 F2 F3 E3 B0 L1 F4 B1 F5 E5 B2 L3 F6 B3 E6 F7 L5 B4 L6 B5 B6 B7",
        *(words(line) for line in one_f_one_b(4, 8).stages[1:]),
    ]
    assert balanced.budget == 3
    assert balanced.name == "1f1b+bpipe"
    assert slots(balanced, 0) == 2
    assert slots(balanced, 1) == 0


def test_odd_number_of_stages():
    # p=5: budget ceil(7/2)=4, so only stage 0 (5 live) has one too many, from F4 (step 4) to B2
    # (step 9).  E2 beside F3: newest before step 3; B2 is step 9, L2 at the latest beside step 8,
    # away 4-7.  From 8 on another: evicted beside step 7, newest F5 (step 6).  Away 8-...; B5 is
    # step 12, L5 beside 11.
    #
    #   step   0  1  2  3  4  5  6  7  8  9 10 11 12 13
    #         F0 F1 F2 F3 F4 B0 F5 B1 F6 B2 B3 B4 B5 B6
    assert words(balance(one_f_one_b(5, 7)).stages[0]) == (
        "F0 F1 F2 E2 F3 F4 B0 F5 E5 B1 L2 F6 B2 B3 L5 B4 B5 B6"
    )


def test_two_stages_need_nothing():
    # p=2: stage 0 holds 2, the budget is 2
    assert balance(one_f_one_b(2, 9)).stages == one_f_one_b(2, 9).stages


def test_one_stage():
    assert balance(one_f_one_b(1, 4)).stages == one_f_one_b(1, 4).stages


@pytest.mark.parametrize(("p", "m"), [(6, 12), (8, 25)])
def test_looking_ahead_where_just_in_time_overshoots(p, m):
    # Evicting the newest as late as possible, and loading as late as possible, needs one slot
    # more than stage p-1 can lend in these two: loads and evictions collide in the cool-down.
    balanced = balance(one_f_one_b(p, m))
    assert_bound(balanced, default_budget(p))
    for stage in range(p // 2):
        lives = lives_of(one_f_one_b(p, m).stages[stage])
        assert evictions(balanced.stages[stage]) == least_cover(lives, default_budget(p))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(1, 70))
def test_the_papers_budget_always_works_with_the_fewest_transfers(p, m):
    base, budget = one_f_one_b(p, m), default_budget(p)
    balanced = balance(base)
    assert_bound(balanced, budget)
    validate(balanced)
    for stage, line in enumerate(balanced.stages):
        assert [op for op in line if op.kind in (Kind.FORWARD, Kind.BACKWARD)] == [
            *base.stages[stage]
        ]
        assert evictions(line) == least_cover(lives_of(line), budget)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(1, 50), st.data())
def test_every_budget_from_the_least(p, m, data):
    base = one_f_one_b(p, m)
    least = least_budget(base)
    # a pair holds at least what its fuller half does, and p+1 between them once m >= p
    assert least <= default_budget(p)
    budget = data.draw(st.integers(least, p))
    balanced = balance(base, budget)
    assert_bound(balanced, budget)
    validate(balanced)
    for line in balanced.stages:
        assert evictions(line) == least_cover(lives_of(line), budget)
    with pytest.raises(BudgetError, match=f"use {least} or more") as caught:
        balance(base, least - 1)
    assert (caught.value.budget, caught.value.least) == (least - 1, least)


@pytest.mark.parametrize("p", range(2, 8))
def test_nothing_better_exists(p):
    # every evictor, every m, every budget: as good as trying everything, and fails only where
    # everything fails
    for m in range(1, p + 4):
        base = one_f_one_b(p, m)
        for budget in range(1, p + 1):
            best = []
            for stage, line in enumerate(base.stages):
                room = budget - min(m, stage + 1)  # stage p-1-x itself holds min(m, x+1)
                evictor = stage < p // 2
                if evictor and room < 0:
                    best.append(None)
                else:
                    best.append(exhaustive(lives_of(line), budget, room if evictor else 0))
            if None in best:
                with pytest.raises(BudgetError):
                    balance(base, budget)
            else:
                assert [evictions(line) for line in balance(base, budget).stages] == best


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_paging_is_exact_for_any_first_in_first_out_line(data):
    # any mix of forwards and backwards, backwards in the order of the forwards
    m = data.draw(st.integers(1, 7))
    begun = done = 0
    starts, ends = [], []
    for step in range(2 * m):
        if begun < m and (begun == done or data.draw(st.booleans())):
            starts.append(step)
            begun += 1
        else:
            ends.append(step)
            done += 1
    lives = list(zip(starts, ends, strict=True))
    budget, room = data.draw(st.integers(1, m)), data.draw(st.integers(0, m))
    need = [sum(a <= t <= b for a, b in lives) - budget for t in range(2 * m)]
    stays = fewest_evictions([Span(*life) for life in lives], need, [room] * (2 * m))
    assert (None if stays is None else len(stays)) == exhaustive(lives, budget, room)
    for stay in stays or ():
        start, end = lives[stay.span]
        assert start < stay.evict < stay.load < end


def test_paging_refuses_nested_spans():
    with pytest.raises(ValueError, match="in order"):
        fewest_evictions([Span(0, 3), Span(1, 2)], [0] * 4, [1] * 4)


@pytest.mark.parametrize("p", [8, 16, 31])
def test_never_two_evictions_beside_one_computation(p):
    for m in (p, 2 * p + 1, 4 * p):
        for line in balance(one_f_one_b(p, m)).stages:
            for one, other in pairwise(line):
                assert not (one.kind is other.kind is Kind.EVICT)
                assert not (one.kind is other.kind is Kind.LOAD)


def test_loads_as_late_as_possible_without_pressure():
    # p=4, budget 3: nothing but L1 hurries (test above), and L1 itself is beside F4, right
    # before B1
    line = balance(one_f_one_b(4, 8)).stages[0]
    for index, op in enumerate(line):
        if op.kind is Kind.LOAD:
            rest = [o for o in line[index:] if o.kind in (Kind.FORWARD, Kind.BACKWARD)]
            assert rest[1] == Op(Kind.BACKWARD, op.microbatch)


def test_enough_budget_changes_nothing():
    base = one_f_one_b(8, 20)
    assert balance(base, 8).stages == base.stages
    assert balance(base, 100).stages == base.stages
    assert balance(base, 8).name == "1f1b"


@pytest.mark.parametrize("budget", [-1, 0, 1, 2])
def test_budget_too_small(budget):
    with pytest.raises(BudgetError) as caught:
        balance(one_f_one_b(4, 8), budget)
    assert str(caught.value) == (
        f"budget {budget} is too small for 1f1b with p=4, m=8: use 3 or more"
    )


def test_middle_stage_without_partner():
    # two stages hold nothing, the middle one of three holds 3: nobody can help it
    line = "F0 F1 F2 B0 B1 B2"
    assert least_budget(oracle.schedule("F0 B0 F1 B1 F2 B2", line, "F0 B0 F1 B1 F2 B2")) == 3


def test_balanced_or_lowered_is_refused():
    with pytest.raises(ValueError, match="already has E1"):
        balance(balance(one_f_one_b(4, 8)))
    with pytest.raises(ValueError, match="already has SF0"):
        balance(lower(one_f_one_b(4, 8)))


@pytest.mark.parametrize(
    ("line", "named"),
    [("F0 F0 B0", "F0 stands twice"), ("B0 F0", "B0 must stand once"), ("F0 F1 B0", "2 forwards")],
)
def test_lines_that_make_no_sense_are_refused(line, named):
    with pytest.raises(ValueError, match=named):
        balance(oracle.schedule(line, line))


def test_slots_of_an_acceptor_are_a_mistake():
    with pytest.raises(ValueError, match="stage 2 of p = 4 does not evict"):
        slots(one_f_one_b(4, 8), 2)


@pytest.mark.parametrize(
    "base",
    [
        oracle.gpipe(4, 6),
        oracle.gpipe(4, 6, reverse=True),
        oracle.interleaved(4, 8, 2),
        oracle.interleaved(4, 12, 3),
        oracle.interleaved(8, 16, 2),
        oracle.bidirectional(4, 8),
        oracle.v_shaped(4, 3),
    ],
    ids=lambda base: f"{base.name}-{base.p}-{base.microbatches}",
)
def test_other_base_schedules(base):
    # one of an evictor, one of the acceptor's own, chunks counted one by one
    chunks = base.chunks
    for count in range(round(least_budget(base) * chunks), max(map(len, base.stages)) // 2 + 1):
        balanced = balance(base, count / chunks)  # budgets count whole stages
        assert_bound(balanced, count)
        validate(balanced)
        validate(lower(balanced))


def test_interleaved_saves_what_its_imbalance_allows():
    # p=4, two chunks, stage x runs 2(4-x-1)+4 warm-up forwards: it holds 11, 9, 7, 5 chunks.
    # 11+5 shared evenly is 8; a transfer in flight counts twice, so 9 (cf. p+1 shared by two
    # stages of 1F1B: ceil((p+2)/2)).
    base = oracle.interleaved(4, 16, 2)
    assert [max(n for n, _ in oracle.counts(line)) for line in base.stages] == [11, 9, 7, 5]
    assert least_budget(base) == 9 / 2  # in micro-batches of a whole stage
    assert_bound(balance(base, 9 / 2), 9)
    with pytest.raises(BudgetError, match=r"budget 4\.499 is too small .* use 4\.5 or more"):
        balance(base, 4.499)


@pytest.mark.parametrize(
    ("p", "chunks", "group", "m", "held", "least"),
    [  # stage 0's chunks 2(p-1)+(v-1)N+1 and half of a pair's 2p+2(v-1)N, one in flight twice
        (4, 2, 4, 12, 11, 9),
        (4, 3, 4, 12, 15, 13),
        (4, 2, 5, 14, 12, 10),
        (8, 2, 8, 16, 23, 17),
        (8, 4, 8, 16, 39, 33),
        (16, 2, 16, 32, 47, 33),
    ],
)
def test_least_budget_of_interleaved_schedules(p, chunks, group, m, held, least):
    base = interleaved(p, m, chunks, group)
    assert max(n for n, _ in oracle.counts(base.stages[0])) == held
    balanced = balance(base)
    assert_bound(balanced, least)
    assert balanced.budget == pytest.approx(least / chunks)
    with pytest.raises(BudgetError):
        balance(base, (least - 1) / chunks)
    # the least as it is printed can be typed
    assert balance(base, float(quantity(least / chunks))).stages == balanced.stages


def test_two_stages_of_many_chunks_have_nothing_to_balance():
    base = interleaved(2, 8, 4)
    assert balance(base).stages == base.stages


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_lines_in_any_order_stay_within_the_bound(data):
    m = data.draw(st.integers(1, 7))
    waiting, alive, line = list(range(m)), [], []
    while waiting or alive:
        if waiting and (not alive or data.draw(st.booleans())):
            alive.append(waiting.pop(0))
            line.append(Op(Kind.FORWARD, alive[-1]))
        else:
            line.append(Op(Kind.BACKWARD, alive.pop(data.draw(st.integers(0, len(alive) - 1)))))
    base = Schedule("any", m, (tuple(line), tuple(line)))
    least = least_budget(base)
    assert_bound(balance(base, least), least)
    budget = data.draw(st.integers(least, m + 1))
    assert_bound(balance(base, budget), budget)
