"""ZB-H1 with a budget: W comes early enough for pairs to share their memory."""

from __future__ import annotations

import itertools

import pytest

from megatron_bpipe.schedule import Kind, Schedule, balance, lower, validate
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec, build, make
from megatron_bpipe.schedule.bases.zero_bubble import zb_h1
from megatron_bpipe.schedule.programs import times
from megatron_bpipe.schedule.validation.occupancy import live, occupancy, spans


def bubble(schedule: Schedule) -> int:
    """Idle units of time of a stage."""
    return max(line[-1] for line in times(schedule)) - 3 * schedule.microbatches


@pytest.mark.parametrize("p", range(4, 13))
def test_every_budget_from_bpipes_to_p(p: int) -> None:
    """The bound holds, pools included; a larger budget never has the larger bubble."""
    for m in (p - 1, p, 2 * p, 3 * p + 1):
        bubbles = []
        for budget in range((p + 3) // 2, p + 1):
            schedule = make(ScheduleSpec("zb-h1", p, m, balanced=True, budget=budget))
            validate(lower(schedule))  # the bound, and that nothing deadlocks
            for x in range(p // 2):
                lent = max(occupancy(schedule.stages[x])[1])
                assert max(occupancy(schedule.stages[p - 1 - x])[0]) + lent <= budget
            bubbles.append(bubble(zb_h1(p, m, budget)))
        assert bubbles == sorted(bubbles, reverse=True)
        if m >= 2 * p:
            assert bubbles[-1] == p - 1  # ZB-H1's
            assert bubbles[0] <= 2 * (p - 1)  # 1F1B's 3 (p-1) without W


def test_the_published_lines_at_a_budget_of_p() -> None:
    for p, m in ((4, 8), (8, 20)):
        assert zb_h1(p, m, p).stages == zb_h1(p, m).stages


def test_an_activation_counts_until_its_w() -> None:
    """Counted by hand: F0 F1 B0 B1 W0 W1 holds 1, 2, 2, 2, 2, 1."""
    line = zb_h1(2, 2).stages[0]
    ops = {str(op): op for op in line}
    line = tuple(ops[name] for name in ("F0", "F1", "B0", "B1", "W0", "W1"))
    assert live(spans(line)) == occupancy(line)[0] == [1, 2, 2, 2, 2, 1]


def test_nothing_leaves_between_b_and_w() -> None:
    for p, m in itertools.product((4, 6, 8), (8, 17)):
        schedule = make(ScheduleSpec("zb-h1", p, m, balanced=True))
        for line in schedule.stages:
            position = {(op.kind, op.microbatch): n for n, op in enumerate(line)}
            for (kind, microbatch), n in position.items():
                if kind in (Kind.EVICT, Kind.LOAD):
                    assert n < position[Kind.BACKWARD, microbatch]


def test_plain_zb_h1_leaves_nothing_to_balance() -> None:
    """By what waits for W the last stages are as full as the first."""
    schedule = zb_h1(8, 16)
    assert {max(occupancy(line)[0]) for line in schedule.stages} == {8}
    with pytest.raises(ValueError, match="use 8 or more"):
        balance(schedule, 7)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_knows_who_splits(name: str) -> None:
    line = build(name, 4, 8).stages[0]
    assert CATALOGUE[name].splits_backward is any(op.kind is Kind.WEIGHT for op in line)
