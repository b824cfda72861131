"""The documents of a report: written, read back, refused where they are not what they should be."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.report.run import RankReport, RunReport, StageReport, merge, read_run
from megatron_bpipe.report.stock import stock_microbatches
from megatron_bpipe.report.timeline import Event, Timeline, read_timelines

STAGE = StageReport(0, 0, 3000, 3, 50, exposed_seconds=0.25, forward={"kept_sites": []})
RUN = RunReport(
    True, 3, 2, 8, 1, (STAGE, replace(STAGE, stage=1, rank=5)), [[1.0, 2.5]], [["0x1p+0"]] * 2
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = replace(RUN, written="2026-01-01", flags=("--bpipe",), packages={"torch": "2"})
    (tmp_path / "memory.json").write_text(run.text())
    assert json.loads(run.text())["stages"][0]["peak_microbatches"] == 3
    back = read_run(tmp_path)
    assert json.loads(back.text()) == json.loads(run.text())
    assert back.stages == run.stages


def test_people_can_read_it() -> None:
    lines = RUN.text().splitlines()
    assert lines[1] == ' "version": 2,'
    assert lines.count('  ["0x1p+0"],') + lines.count('  ["0x1p+0"]') == 2  # a line an iteration
    assert any(line.strip() == '"evicted_bytes": 0,' for line in lines)


def test_timelines_are_read_back(tmp_path: Path) -> None:
    events = [Event("F0", 1.0, 2.0, 0, 10, 1), Event("EW0", 2.0, 3.0, 0, 0, 0, 1.5, 2.5, 0.25)]
    for stage in (0, 1):
        for rank in (stage, stage + 2):
            timeline = Timeline(stage, rank, [events, events])
            (tmp_path / timeline.file_name).write_text(timeline.text())
    found = read_timelines(tmp_path, 2)
    assert [t.rank for t in found] == [0, 1]
    assert asdict(found[0])["iterations"] == [[asdict(e) for e in events]] * 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 1}, "format version 1, this reads 2"),
        ({"version": None}, "format version None"),
        ({"stages": []}, r"stages is \[\]"),
        ({"m": "8"}, r"\.m is '8'"),
        ({"bpipe": 1}, r"\.bpipe is 1"),
        ({"p": True}, r"\.p is True"),
        ({"budget": -1}, r"\.budget is -1"),
    ],
)
def test_a_bad_document_names_file_and_field(tmp_path: Path, change: dict, named: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(json.dumps(json.loads(RUN.text()) | change))
    with pytest.raises(ReportError, match=named) as caught:
        read_run(tmp_path)
    assert str(path) in str(caught.value)
    assert "record it again" in str(caught.value)


def test_a_report_is_the_worst_rank_of_each_stage() -> None:
    heavy = replace(STAGE, rank=2, own_activation_bytes=4000)
    lender = replace(STAGE, stage=1, rank=3, own_activation_bytes=500, pool_bytes=5000)
    ranks = [
        RankReport(stage, [[float(stage.rank), 9.0]], losses, 8)
        for stage, losses in ((STAGE, []), (heavy, []), (lender, [["0x1p+1"]]))
    ]
    report = merge(ranks, bpipe=True, budget=3, written="", flags=(), packages={})
    assert [stage.rank for stage in report.stages] == [2, 3]
    assert [stage.stock_microbatches for stage in report.stages] == [2, 1]
    assert report.iterations[0][0] == 0.0
    assert report.losses == [["0x1p+1"]]


@pytest.mark.parametrize(
    ("p", "m", "v", "peaks"),
    [
        (4, 8, 1, (4, 3, 2, 1)),
        (4, 2, 1, (2, 2, 2, 1)),
        # Narayanan et al.: 2 (p - x - 1) + (v - 1) p + 1 chunks
        (4, 8, 2, (11 / 2, 9 / 2, 7 / 2, 5 / 2)),
        (4, 0, 1, (None,) * 4),
    ],
)
def test_what_stock_would_hold(p: int, m: int, v: int, peaks: tuple) -> None:
    assert stock_microbatches(p, m, v) == peaks
