"""The lending solver against exhaustive search, and on cases that can be worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule.balancing.lending import (
    Lending,
    LimitError,
    StageNeed,
    Way,
    emptiest,
    on_host,
    within,
)
from megatron_bpipe.schedule.ops import HOST, Loan


@st.composite
def needs(draw: st.DrawFn) -> tuple[StageNeed, ...]:
    """A few stages, each with a few ways, sizes small enough that ties and near misses abound."""
    stages = []
    for _ in range(draw(st.integers(2, 4))):
        slot = draw(st.integers(1, 6))
        own = draw(st.integers(0, 20))
        ways = [Way(own)]
        for _ in range(draw(st.integers(0, 3))):
            less = draw(st.integers(1, 12))
            ways.append(Way(max(0, own - less), draw(st.integers(1, 4)), draw(st.integers(1, 30))))
        stages.append(StageNeed(draw(st.integers(0, 12)), slot, tuple(ways)))
    return tuple(stages)


def spreads(slots: int, lenders: Sequence[int]) -> Iterator[dict[int, int]]:
    """All ways to give slots to lenders."""
    if not lenders:
        if not slots:
            yield {}
        return
    for count in range(slots + 1):
        for rest in spreads(slots - count, lenders[1:]):
            yield {lenders[0]: count} | rest


def everything(stages: Sequence[StageNeed], host: bool) -> Iterator[tuple[int, int, int]]:
    """(highest peak, bytes in host memory, bytes moved) of all that could be done."""
    for chosen in itertools.product(*(stage.ways for stage in stages)):
        lenders = [y for y, way in enumerate(chosen) if not way.slots]
        evictors = [x for x, way in enumerate(chosen) if way.slots]
        where = [*lenders, HOST] if host else lenders
        for placed in itertools.product(*(list(spreads(chosen[x].slots, where)) for x in evictors)):
            peaks = [stage.fixed + way.own for stage, way in zip(stages, chosen, strict=True)]
            hosted = 0
            for x, spread in zip(evictors, placed, strict=True):
                for lender, count in spread.items():
                    if lender == HOST:
                        hosted += count * stages[x].slot
                    else:
                        peaks[lender] += count * stages[x].slot
            yield max(peaks), hosted, sum(way.moved for way in chosen)


@given(needs())
@settings(max_examples=120, deadline=None)
def test_emptiest_is_the_best_there_is(stages: tuple[StageNeed, ...]) -> None:
    best = min((peak, moved) for peak, _, moved in everything(stages, host=False))
    found = emptiest(stages)
    assert (max(found.peaks), found.moved) == best
    check(stages, found)


@given(needs(), st.integers(0, 45))
@settings(max_examples=120, deadline=None)
def test_within_moves_the_fewest_bytes(stages: tuple[StageNeed, ...], limit: int) -> None:
    possible = [moved for peak, _, moved in everything(stages, host=False) if peak <= limit]
    if possible:
        found = within(stages, limit, host=False)
        assert found.moved == min(possible)
        assert max(found.peaks) <= limit
        check(stages, found)
    else:
        with pytest.raises(LimitError) as raised:
            within(stages, limit, host=False)
        assert raised.value.least == min(peak for peak, _, _ in everything(stages, host=False))


@given(needs(), st.integers(0, 45))
@settings(max_examples=80, deadline=None)
def test_the_host_takes_what_no_stage_has_room_for(
    stages: tuple[StageNeed, ...], limit: int
) -> None:
    possible = [hosted for peak, hosted, _ in everything(stages, host=True) if peak <= limit]
    if not possible:
        with pytest.raises(LimitError) as raised:
            within(stages, limit)
        assert raised.value.least == max(stage.least for stage in stages)
        return
    found = within(stages, limit)
    hosted = sum(
        loan.slots * stages[loan.evictor].slot for loan in found.loans if loan.lender == HOST
    )
    assert hosted == min(possible)
    check(stages, found)


def check(stages: Sequence[StageNeed], found: Lending) -> None:
    """Every slot lies somewhere, nobody lends to itself or lends what it evicts."""
    assert found.proved
    evictors = {x for x, way in enumerate(found.ways) if way.slots}
    for x in evictors:
        assert sum(loan.slots for loan in found.loans if loan.evictor == x) == found.ways[x].slots
    assert {loan.evictor for loan in found.loans} == evictors
    assert not {loan.lender for loan in found.loans} & evictors
    for way, stage in zip(found.ways, stages, strict=True):
        assert way in stage.ways


def of_1f1b(weights: Sequence[int], fixed: Sequence[int]) -> tuple[StageNeed, ...]:
    """Stages of 1F1B: p - x micro-batches of so many bytes, any number but one may leave."""
    p = len(weights)
    stages = []
    for x, weight in enumerate(weights):
        held = p - x
        kept = [Way(held * weight)]
        for keep in range(held - 1, 1, -1):
            kept.append(Way(keep * weight, held - keep + 1, 8 * (held - keep) * weight, keep))
        stages.append(StageNeed(fixed[x], weight, tuple(kept)))
    return tuple(stages)


def test_equal_stages_come_to_the_papers_bound() -> None:
    """Every p up to 16: ceil((p+2)/2) micro-batches, the paper's, and its pairs where tight."""
    for p in range(4, 17):
        found = emptiest(of_1f1b([10] * p, [5] * p))
        assert max(found.peaks) <= 5 + 10 * ((p + 3) // 2)
    found = emptiest(of_1f1b([10] * 8, [0] * 8))
    assert max(found.peaks) == 50
    assert all(loan.lender == 7 - loan.evictor for loan in found.loans)


def test_a_full_last_stage_lends_nothing() -> None:
    """Logits on the last stage: the paper's pairs would put stage 0's activations on top."""
    found = emptiest(of_1f1b([10, 10, 10, 10], [10, 10, 10, 90]))
    assert max(found.peaks) == 100
    assert not found.loans
    found = emptiest(of_1f1b([10, 10, 10, 10], [0, 0, 0, 15]))
    assert found.peaks == (30, 30, 30, 35)
    assert set(found.loans) == {Loan(0, 2, 1), Loan(0, 3, 1)}


def test_one_evictor_uses_two_lenders() -> None:
    stages = (
        StageNeed(0, 10, (Way(60), Way(30, 4, 100))),
        StageNeed(0, 10, (Way(10),)),
        StageNeed(0, 10, (Way(10),)),
    )
    found = emptiest(stages)
    assert max(found.peaks) == 30
    assert {loan.lender: loan.slots for loan in found.loans} == {1: 2, 2: 2}


def test_a_stage_that_was_to_lend_needs_help() -> None:
    stages = (
        StageNeed(0, 10, (Way(20), Way(10, 1, 5))),
        StageNeed(0, 10, (Way(60), Way(30, 3, 9))),
    )
    found = emptiest(stages)
    assert found.loans == (Loan(1, 0, 3),)
    assert found.peaks == (50, 30)


def test_only_the_host_helps_stages_that_are_all_full() -> None:
    stages = (StageNeed(0, 10, (Way(40), Way(20, 3, 9))),) * 2
    assert max(emptiest(stages).peaks) == 40
    found = within(stages, 30)
    assert {loan.lender for loan in found.loans} == {HOST}
    with pytest.raises(LimitError, match="stage 0 needs 20, 5 more"):
        within(stages, 15)
    assert on_host(stages).peaks == (20, 20)
    with pytest.raises(LimitError):
        on_host(stages, 19)


def test_many_stages_of_different_sizes_take_no_time() -> None:
    weights = [97 + 13 * (x * 7 % 11) for x in range(32)]
    found = emptiest(of_1f1b(weights, [50 * (x % 3) for x in range(32)]))
    assert max(found.peaks) < max(s.stock for s in of_1f1b(weights, [0] * 32))
