"""The clock: against unit-time runs, closed forms and itself; speed; what shares a link."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import ScheduleError, balance, lower, one_f_one_b
from megatron_bpipe.schedule.balancing.offload import offload
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, build
from megatron_bpipe.schedule.bases.gpipe import gpipe
from megatron_bpipe.schedule.programs import times
from megatron_bpipe.simulate import (
    Costs,
    Link,
    Network,
    StageCosts,
    bubble_ratio,
    even_costs,
    exposed_seconds,
    simulate,
    waiting_seconds,
)
from tests.schedule import oracle


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (6, 6), (8, 16)])
def test_unit_costs_give_the_unit_time_run(name, p, m):
    schedule = build(name, p, m)
    lowered = lower(schedule)
    chunks = 1 + max(op.chunk for op in schedule.stages[0])
    costs = even_costs(p, forward=chunks, backward=chunks, weight=chunks, chunks=chunks)
    expected = times(schedule)
    found = simulate(lowered, costs)
    for stage in range(p):
        over = [
            e
            for e, op in zip(expected[stage], schedule.stages[stage], strict=True)
            if op.kind.computation
        ]
        ends = [
            e
            for e, op in zip(found.ends[stage], lowered.stages[stage], strict=True)
            if op.kind.computation
        ]
        assert ends == over


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("make", [one_f_one_b, gpipe])
def test_bubble_of_unequal_forward_and_backward(make, p):
    """Both have (p-1)(F + B) of fill and drain, whatever F and B."""
    found = simulate(lower(make(p, 4 * p)), even_costs(p, forward=1.0, backward=2.5, once=7.0))
    assert found.pipeline_seconds == pytest.approx((4 * p + p - 1) * 3.5)
    assert found.seconds == pytest.approx(found.pipeline_seconds + 7)
    assert bubble_ratio(found) == pytest.approx((p - 1) / (5 * p - 1))


def test_recomputation_lengthens_every_backward():
    plain, longer = StageCosts((1.0,), (2.0,)), StageCosts((1.0,), (2.0,), recompute=0.5)
    lowered = lower(one_f_one_b(4, 8))
    assert simulate(lowered, Costs((plain,) * 4)).seconds == 11 * 3.0
    assert simulate(lowered, Costs((longer,) * 4)).seconds == 11 * 3.5


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(CATALOGUE)),
    p=st.sampled_from([2, 4, 6]),
    forward=st.floats(0.1, 3),
    backward=st.floats(0.1, 3),
    send=st.floats(0, 0.5),
    transfer=st.floats(0, 2),
    size=st.integers(0, 100),
)
def test_both_clocks_agree_where_nothing_is_shared(
    name, p, forward, backward, send, transfer, size
):
    """The run-ahead clock, and the ordered one with a vanishing tensor-parallel share."""
    lowered = lower(build(name, p, 2 * p))
    stage = StageCosts((forward,), (backward,), (0.5,), evict=transfer, load=transfer, moved=size)
    costs = Costs((stage,) * p, send=send, message=size)
    network = Network(Link(30.0, 0.01), Link(7.0, 0.1), Link(9.0), tuple(x % 2 for x in range(p)))
    ahead = simulate(lowered, costs, network)
    ordered = simulate(lowered, costs, replace(network, tp_share=1e-15))
    for one, other in zip(ahead.ends, ordered.ends, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_message_waits_for_both_ends(shared):
    """Stage 1 is busy for 5: stage 0 cannot go on before, unless messages have time labels."""
    costs = Costs((StageCosts((1.0,), (1.0,)), StageCosts((5.0,), (1.0,))), send=0.5)
    network = Network(tp_share=1e-15) if shared else Network()
    lowered = lower(one_f_one_b(2, 3))
    found = simulate(lowered, costs, network)
    assert [str(op) for op in lowered.stages[0][:5]] == ["F0", "SF0", "F1", "SF1", "RB0"]
    # F0 of stage 1 ends at 6.5, B0 at 7.5, its gradient is over with F1's output
    assert found.ends[0][:5] == pytest.approx([1, 1.5, 2.5, 8.0, 8.0])
    lowered = lower(gpipe(2, 3))
    found = simulate(lowered, costs, network)
    assert [str(op) for op in lowered.stages[0][:4]] == ["F0", "SF0:1", "F1", "SF1:2"]
    assert found.ends[0][:4] == pytest.approx([1, 1, 2, 2])
    assert found.ends[1][1] == pytest.approx(6.5)  # F0 on stage 1


def test_transfers_that_fit_cost_nothing_and_others_what_is_left_over():
    p, m = 4, 8
    lowered = lower(balance(one_f_one_b(p, m)))
    hidden = simulate(lowered, even_costs(p, forward=1, backward=2, transfer=0.9))
    assert exposed_seconds(hidden) == 0
    assert sum(waiting_seconds(hidden, x) for x in range(p)) == 0
    late = simulate(lowered, even_costs(p, forward=1, backward=2, transfer=1.5))
    # stage 0: E1 beside F2, L1 beside F4, L3 and E5 .. half a unit each beside a forward
    assert waiting_seconds(late, 0) > 0
    assert exposed_seconds(late) > 0
    assert late.transfers[0].op.microbatch == 1
    assert late.transfers[0].end - late.transfers[0].start == 1.5


def test_one_lane_for_both_ways_makes_copies_queue():
    """E3 beside B0 and L1 beside F4 overlap only when both ways have a link of their own."""
    lowered = lower(balance(one_f_one_b(4, 8)))
    costs = even_costs(4, forward=1, backward=1, transfer=1.9)
    full = simulate(lowered, costs, Network())
    half = simulate(lowered, costs, Network(full_duplex=False))
    assert half.seconds >= full.seconds


def test_contention_shares_a_link():
    """Stage 1's result and stage 0's eviction of 40 bytes... share nothing in 1F1B at full duplex
    but stage 0's outgoing link: F2's message (10 bytes) leaves while E1 (100 bytes) does."""
    stage = StageCosts((1.0,), (2.0,), moved=100)
    costs = Costs((stage,) * 4, message=10)
    lowered = lower(balance(one_f_one_b(4, 8)))
    link = Link(bandwidth=50.0)
    alone = simulate(lowered, costs, Network(link))
    shared = simulate(lowered, costs, Network(link, contention=True))
    assert alone.transfers[0].end - alone.transfers[0].start == 2.0
    assert shared.transfers[0].end - shared.transfers[0].start >= 2.0
    assert shared.seconds >= alone.seconds


def test_tensor_parallel_traffic_and_a_copy_slow_each_other_down():
    """u = 1/2: a computation of 2 with a copy of 1 beside it.  Both at 1/1.5: the copy ends at 1.5,
    1 of the computation is done by then, 1 remains: 2.5."""
    lowered = lower(balance(one_f_one_b(4, 8)))
    stage = StageCosts((2.0,), (2.0,), moved=10)
    network = Network(Link(bandwidth=10.0), tp_share=0.5)
    found = simulate(lowered, Costs((stage,) * 4), network)
    evict = found.transfers[0]
    line = [str(op) for op in lowered.stages[0]]
    f2 = line.index("F2")
    start = found.starts[0][f2]
    assert evict.end - evict.start == pytest.approx(1.5)
    assert found.ends[0][f2] - start == pytest.approx(2.5)


def test_host_offload_runs_over_the_host_link():
    schedule = offload(one_f_one_b(3, 6), 2 + 1)
    lowered = lower(schedule)
    found = simulate(lowered, even_costs(3), Network(host=Link(bandwidth=1.0)))
    assert found.seconds == (6 + 2) * 2.0
    tight = lower(offload(one_f_one_b(5, 10), 3))
    stage = StageCosts((1.0,), (1.0,), moved=5)
    slow = simulate(tight, Costs((stage,) * 5), Network(host=Link(bandwidth=1.0)))
    fast = simulate(tight, Costs((stage,) * 5), Network(host=Link(bandwidth=1000.0)))
    assert slow.seconds > fast.seconds


def test_deadlock_is_found_and_marked():
    """Stage 0 waits for a gradient before it sends what that is made of."""
    lowered = oracle.schedule("F0 RB0 SF0 B0", "RF0 F0 B0 SB0")
    for network in (Network(), Network(contention=True)):
        with pytest.raises(ScheduleError, match="deadlock with messages that wait for both ends"):
            simulate(lowered, even_costs(2), network)


@pytest.mark.parametrize("name", ["1f1b", "bpipe"])
def test_work_grows_with_the_micro_batches_and_no_faster(name):
    """In calls of functions; a square would be 64 times here."""
    costs = even_costs(32, forward=1, backward=2, send=0.01, transfer=0.5)

    def calls(m):
        lowered = lower(build(name, 32, m))
        count = 0

        def seen(frame, event, what):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(seen)
        try:
            found = simulate(lowered, costs)
        finally:
            sys.setprofile(None)
        assert found.seconds > m * 3
        return count

    assert calls(256) < 10 * calls(32)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: simulate(one_f_one_b(2, 2), even_costs(2)), "is not lowered"),
        (lambda: simulate(lower(one_f_one_b(2, 2)), even_costs(3)), "costs for 3 stages"),
        (lambda: StageCosts((-1.0,), (1.0,)), "forward is -1.0: give seconds, 0 or more"),
        (lambda: StageCosts((1.0,), ()), "one entry at least"),
        (lambda: StageCosts((1.0,), (1.0,), moved=-4), "moved is -4: give bytes, 0 or more"),
        (lambda: StageCosts((float("nan"),), (1.0,)), "forward is nan"),
        (lambda: even_costs(2, send=-1), "send is -1"),
        (lambda: Link(bandwidth=0), "bandwidth is 0: give bytes a second"),
        (lambda: Link(latency=-1), "latency is -1: give seconds"),
        (lambda: Network(tp_share=2), "tp_share is 2: a share is from 0 to 1"),
    ],
)
def test_nonsense_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
