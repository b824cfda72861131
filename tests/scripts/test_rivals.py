"""`benchmarks/rivals.py`: what it shows of its measurements; the runs themselves are its own."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rivals import pace, rivals
from benchmarks.rivals_rank import paced
from benchmarks.rivals_report import Rival, Row, _costs, best, draw, table
from megatron_bpipe.schedule.bases.catalogue import EXECUTED, ScheduleSpec, make
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.simulate import simulate
from megatron_bpipe.simulate.costs import Costs, StageCosts
from tests.harness import ROOT


def row(seconds: float, peak: int, name: str = "x") -> Row:
    return Row(Rival(name, ()), (seconds, seconds), peak, 1, None, seconds, peak)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9))
def test_the_best_are_those_that_nothing_beats(points: list[tuple[int, int]]) -> None:
    rows = [row(a, b) for a, b in points]
    wanted = {
        (a, b)
        for a, b in points
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
    }
    assert {(r.median, r.peak) for r in best(rows)} == wanted


def test_every_rival_can_run_and_has_its_time() -> None:
    """A backward and its W last two forwards, on all chunks together."""
    for rival in rivals(4, 128, 128):
        assert rival.schedule in EXECUTED
        spec = ScheduleSpec(rival.schedule, 4, 8, rival.chunks, balanced=rival.balanced)
        assert make(spec).chunks == rival.chunks
        times = pace(rival, 0.03)
        total = rival.chunks * (times["backward"] + rival.splits * times["weight"])
        assert abs(total - 0.06 - 0.03 * rival.recomputed) < 1e-9


def test_a_paced_op_lasts() -> None:
    start = time.perf_counter()
    assert paced(lambda: 7, 0.05)() == 7
    assert time.perf_counter() - start >= 0.05


def test_table_and_figure(tmp_path: Path) -> None:
    rows = [row(a, b, f"way {a}{b}") for a, b in itertools.product((1, 2), (2**20, 2**21))]
    shown = table(rows).splitlines()
    assert len(shown) == 2 + len(rows)
    assert len({line.count("|") for line in shown}) == 1
    draw(rows, tmp_path / "rivals.png", "four ways")
    assert (tmp_path / "rivals.png").stat().st_size > 10_000


def test_the_published_forecast_is_this_simulators_and_near_what_was_measured() -> None:
    """One message's time and one rest make all thirteen; of stock's run, within 7.5 % of the rest.

    Any two that differ by more than 4 % come in the measured order. Where messages cost nothing
    V-Min is 14 % too fast.
    """
    found = json.loads((ROOT / "docs" / "results" / "rivals.json").read_text())
    forward, p, m = found["pace_milliseconds"] / 1000, 4, 8
    whole = Costs((StageCosts((forward,), (2 * forward,)),) * p)
    rivals = {each["rival"]["name"]: Rival(**each["rival"]) for each in found["rows"]}
    measured = {r["rival"]["name"]: statistics.median(r["seconds"]) for r in found["rows"]}
    foretold = {r["rival"]["name"]: r["predicted_seconds"] for r in found["rows"]}

    def simulated(name: str, send: float) -> float:
        rival = rivals[name]
        spec = ScheduleSpec(rival.schedule, p, m, rival.chunks, balanced=rival.balanced)
        schedule = lower(replace(make(spec), to_host=rival.to_host))
        return simulate(schedule, _costs(rival, replace(whole, send=send))).seconds

    low, high = 0.0, forward / 2  # 1F1B waits for its messages, interleaving has them beside
    for _ in range(30):
        send = (low + high) / 2
        less = simulated("1F1B", send) - simulated("interleaved", send)
        wide = less > foretold["1F1B"] - foretold["interleaved"]
        low, high = (low, send) if wide else (send, high)
    rest = foretold["1F1B"] - simulated("1F1B", send)
    assert 0 < rest < 0.05 * foretold["1F1B"]
    for name, seconds in foretold.items():
        assert simulated(name, send) + rest == pytest.approx(seconds, rel=1e-3), name
    off = {name: foretold[name] / seconds - 1 for name, seconds in measured.items()}
    assert max(map(abs, off.values())) < 0.075
    assert abs(off["1F1B"]) < 2e-3
    assert (simulated("V-Min", 0.0) + rest) / measured["V-Min"] < 0.88
    for a, b in itertools.combinations(measured, 2):
        if abs(measured[a] / measured[b] - 1) > 0.04:
            assert (measured[a] < measured[b]) is (foretold[a] < foretold[b]), (a, b)
