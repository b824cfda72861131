"""Schedules without a flush, call by call: the cut and its proof; short runs stand for all."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import Kind, Schedule, ScheduleError, one_f_one_b
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec
from megatron_bpipe.schedule.bases.pipedream import PIPEDREAM, PIPEDREAM_2BW
from megatron_bpipe.schedule.flush_free import calls as cut
from megatron_bpipe.schedule.flush_free.calls import lowered_calls
from megatron_bpipe.schedule.flush_free.plan import call_plan, horizon, text, versions_kept
from megatron_bpipe.schedule.handshake import handshake_programs
from megatron_bpipe.schedule.validation.occupancy import peak
from megatron_bpipe.schedule.validation.rendezvous import execute

NAMES = ["pipedream-2bw", "pipedream", "continuous"]


def sizes(name: str, p: int, m: int) -> ScheduleSpec:
    return ScheduleSpec(name, p, 1 if name == "pipedream" else max(m, p - 1))


def run(spec: ScheduleSpec, iterations: int):
    flush_free = CATALOGUE[spec.name].without_flush
    return flush_free.run(spec.p, spec.m, iterations)


def computations(ops):
    return [op for op in ops if op.kind.computation]


def test_2bw_by_hand():
    """p = 4, m = 4: what the page's table says, stage 0 and the last one."""
    spec = ScheduleSpec("pipedream-2bw", 4, 4)

    def line(stage: int, number: int, left: int) -> str:
        return text(computations(call_plan(spec, stage, number, left).stage.ops))

    assert line(0, 0, 9) == "F0@0 F1@0 F2@0 F3@0 B0@0 F4@0 B1@0 F5@0 B2@0 F6@0 B3@0"
    assert line(0, 1, 9) == "F7@0 B4@0 F8@1 B5@0 F9@1 B6@0 F10@1 B7@0"
    assert line(0, 2, 9) == "F11@1 B8@1 F12@2 B9@1 F13@2 B10@1 F14@2 B11@1"
    assert line(0, 3, 0) == "F15@2 B12@2 B13@2 B14@2 B15@2"
    assert line(3, 2, 9) == "F8@1 B8@1 F9@1 B9@1 F10@1 B10@1 F11@1 B11@1"
    assert line(0, 0, 0) == text([op._replace(version=0) for op in one_f_one_b(4, 4).stages[0]])


def test_pipedream_by_hand():
    spec = ScheduleSpec("pipedream", 4, 1)
    lines = [[computations(call_plan(spec, x, n, 9).stage.ops) for n in range(5)] for x in range(4)]
    assert [text(call) for call in lines[0]] == [
        "F0@0 F1@0 F2@0 F3@0 B0@0",
        "F4@1 B1@0",
        "F5@2 B2@0",
        "F6@3 B3@0",
        "F7@4 B4@1",
    ]
    assert [text(call) for call in lines[3]] == [f"F{t}@{t} B{t}@{t}" for t in range(5)]


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(NAMES), p=st.integers(1, 6), m=st.integers(1, 7), n=st.integers(1, 6))
def test_the_calls_together_are_the_whole_run(name, p, m, n):
    spec = sizes(name, p, m)
    whole = run(spec, n)
    for stage, line in enumerate(whole.stages):
        pieces = [call_plan(spec, stage, t, n - 1 - t) for t in range(n)]
        assert [op for call in pieces for op in computations(call.stage.ops)] == list(line)
        for t, call in enumerate(pieces):
            done = [op.microbatch for op in call.stage.ops if op.kind is Kind.BACKWARD]
            assert sorted(done) == list(range(t * spec.m, (t + 1) * spec.m))
            assert call.first == t * spec.m
            assert call.flushes == (t == n - 1) == (not call.carried and t == n - 1)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(NAMES), p=st.integers(2, 6), m=st.integers(1, 7))
def test_weights_lag_as_is_said_and_exist(name, p, m):
    spec = sizes(name, p, m)
    for stage in range(p):
        lag = 1 if name == "pipedream-2bw" else p - 1 - stage
        alive = {0}
        for t in range(2 * p + 3):
            call = call_plan(spec, stage, t, 99)
            for op in computations(call.stage.ops):
                assert op.version == max(0, op.microbatch // spec.m - lag)
                assert op.version in alive
            alive = {v for v in alive | {t + 1} if v >= call.oldest}
            assert len(alive) <= versions_kept(spec, stage)
        assert len(alive) == versions_kept(spec, stage) == lag + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_short_runs_stand_for_long_ones(name, p):
    """Every call of a run of many iterations is one of a short run, moved on."""
    spec = sizes(name, p, p + 1)
    n = 3 * horizon(spec) + 4
    long = lowered_calls(run(spec, n), spec.m)
    for stage in range(p):
        for t in range(n):
            short = call_plan(spec, stage, t, n - 1 - t).stage.ops
            plain = [[op._replace(label=None) for op in ops] for ops in (long[t][stage], short)]
            assert plain[0] == plain[1], (stage, t)


def test_a_stage_holds_what_it_holds_in_1f1b():
    for p, m in ((4, 4), (4, 9), (8, 7)):
        assert [peak(line) for line in PIPEDREAM_2BW.run(p, m, 5).stages] == [
            p - x for x in range(p)
        ]
    assert [peak(line) for line in PIPEDREAM.run(4, 1, 12).stages] == [4, 3, 2, 1]
    # mini-batches: m times as many
    assert [peak(line) for line in run(ScheduleSpec("continuous", 4, 3), 8).stages] == [
        12, 9, 6, 3,
    ]  # fmt: skip


def test_a_message_received_a_call_later_is_refused(monkeypatch):
    """The rule of the sender's call is needed: without it the loop's gatherings deadlock."""
    stock = cut._cut_as_megatron

    def late(schedule, m):
        lines = stock(schedule, m)
        first, second = lines[1][:2]
        assert first[-1].kind is Kind.RECV_FORWARD
        lines[1][:2] = [first[:-1], (first[-1], *second)]
        return lines

    monkeypatch.setattr(cut, "_cut_as_megatron", late)
    with pytest.raises(ScheduleError, match="one call has both sides"):
        lowered_calls(PIPEDREAM_2BW.run(3, 4, 3), 4)
    monkeypatch.setattr(cut, "_check_calls_of_messages", lambda *_: None)
    with pytest.raises(ScheduleError, match="deadlock"):
        lowered_calls(PIPEDREAM_2BW.run(3, 4, 3), 4)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 16)])
def test_one_gathering_an_iteration_brings_half_the_bubble_back(p, m):
    """In units of F = B = 1, an iteration in the steady state: (p-1) B is half of 1F1B's bubble."""
    n = 6
    calls = lowered_calls(PIPEDREAM_2BW.run(p, m, n), m)
    lines = tuple(tuple(op for call in calls for op in call[x]) for x in range(p))
    whole = Schedule("2bw", m * n, lines, lowered=True)
    starts = [list(accumulate((len(call[x]) for call in calls[:-1]), initial=0)) for x in range(p)]

    def period(gathered: bool) -> int:
        programs = handshake_programs(whole, starts if gathered else [[]] * p)
        over, stuck = execute(programs)
        assert not stuck
        ends = [
            max(t for t, op in zip(over[0], programs[0].ops, strict=True) if op < start)
            for start in starts[0][1:]
        ]
        (only,) = {b - a for a, b in pairwise(ends)}
        return only

    assert period(gathered=False) == 2 * m
    assert period(gathered=True) == 2 * m + (p - 1)


def test_refusals():
    with pytest.raises(ValueError, match="need p-1 = 3 or more"):
        call_plan(ScheduleSpec("pipedream-2bw", 4, 2), 0, 0, 9)
    assert call_plan(ScheduleSpec("pipedream-2bw", 4, 2), 0, 0, 0).flushes  # nothing runs ahead
    with pytest.raises(ValueError, match="an iteration has 1; use continuous"):
        call_plan(ScheduleSpec("pipedream", 4, 2), 0, 0, 9)
    with pytest.raises(ValueError, match="'1f1b' ends every iteration with a flush"):
        call_plan(ScheduleSpec("1f1b", 4, 2), 0, 0, 9)
