"""Activations in parts through the clock, memory over time, and the pictures."""

from __future__ import annotations

import pytest

from megatron_bpipe.schedule import Kind, balance, draw, lower, one_f_one_b
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.simulate import Costs, StageBytes, StageCosts, exposed_seconds, simulate
from megatron_bpipe.simulate.draw.picture import panel_of
from megatron_bpipe.simulate.memory import memory_steps, share
from tests.schedule.oracle import words


def costs(p: int, transfer: float = 0.0, chunks: int = 1) -> Costs:
    one = StageCosts((1 / chunks,), (2 / chunks,), evict=transfer, load=transfer)
    return Costs((one,) * p)


@pytest.mark.parametrize("base", [one_f_one_b(4, 8), interleaved(4, 8, 2)])
def test_parts_cost_no_time_where_copies_are_hidden(base):
    chunks = base.chunks
    stock = simulate(lower(base), costs(4, chunks=chunks)).seconds
    found = simulate(lower(balance(base, None, 4)), costs(4, 0.5 / chunks, chunks))
    assert found.seconds == pytest.approx(stock)
    assert exposed_seconds(found) == pytest.approx(0)


def test_each_part_takes_its_share_of_a_backward_and_of_a_copy():
    found = simulate(lower(balance(one_f_one_b(4, 8), 2.75, 4)), costs(4, 0.4))
    line = found.schedule.stages[0]
    for op, start, end in zip(line, found.starts[0], found.ends[0], strict=True):
        if op.kind is Kind.BACKWARD:
            assert end - start == pytest.approx(2 if op.part is None else 0.5)
    assert {round(one.end - one.start, 9) for one in found.transfers} == {0.1}


def test_a_slow_link_is_waited_for_unit_by_unit():
    # a copy of a whole activation takes 3 forwards; a unit 0.75, beside half a forward of backward
    found = simulate(lower(balance(one_f_one_b(4, 8), 2.75, 4)), costs(4, 3.0))
    assert exposed_seconds(found) > 1


@pytest.mark.parametrize(("budget", "units"), [(3, 12), (2.75, 11)])
def test_memory_is_what_the_bound_says(budget, units):
    schedule = balance(one_f_one_b(4, 8), budget, 4)
    found = simulate(lower(schedule), costs(4, 0.4))
    sizes = (StageBytes((400,)),) * 4
    peaks = [memory.peak for memory in memory_steps(found, sizes)]
    assert max(peaks) == peaks[0] == 100 * units
    last = memory_steps(found, sizes)[3]
    assert last.pool == 100 * (6 if budget == 3 else 7)


def test_shares_add_up():
    assert sum(share(1001, part, 4) for part in range(4)) == 1001


def test_a_backward_in_parts_is_one_box():
    schedule = balance(one_f_one_b(4, 6), 2.75, 4)
    panel = panel_of(simulate(lower(schedule), costs(4)))
    boxes = [box.op for box in panel.boxes if box.stage == 0]
    assert sorted(boxes) == sorted(f"{kind}{i}" for kind in "FB" for i in range(6))
    assert {box.end - box.start for box in panel.boxes if box.kind == "B"} == {2.0}
    assert {"E0/0", "L3/2"} <= {move.op for move in panel.moves}
    assert panel.curves[0].peak == panel.curves[0].budget == 2.75


def test_drawing():
    # p=4, m=6 in 2.75: transfers of one activation are written together, all four parts as one
    first, *rows = draw(balance(one_f_one_b(4, 6), 2.75, 4)).splitlines()
    assert first == "1f1b+bpipe: p=4, m=6, budget 2.75, 3.25 micro-batches evicted in 4 parts each"
    computed, leaving, coming = (rows[n].split() for n in (1, 2, 3))
    assert computed[:2] == ["0:", "max"]
    assert [op for op in computed[3:] if op != "."] == words(one_f_one_b(4, 6).stages[0]).split()
    assert leaving == ["E0/0", "E1", "E3/0-1", "E3/2", "E4/0-1"]
    assert coming == ["L0/0", "L1/3", "L1/2-0", "L3/2-0", "L4/1-0"]
