"""Pages, figures, traces and text; the page in a real browser."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.report.timeline import Timeline, read_timelines
from megatron_bpipe.schedule import lower
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, build
from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.simulate import StageBytes, even_costs, simulate
from megatron_bpipe.simulate.draw.chrome_trace import chrome_trace
from megatron_bpipe.simulate.draw.html import page
from megatron_bpipe.simulate.draw.picture import Picture, memory_text, panel_of, time_text
from megatron_bpipe.simulate.draw.terminal import draw_panel
from megatron_bpipe.simulate.recorded.overlay import overlay
from megatron_bpipe.simulate.recorded.recording import read_report
from tests.simulate.reports import write_report


def two_panels(p: int = 4, m: int = 8) -> Picture:
    panels = []
    for name in ("1f1b", "bpipe"):
        found = simulate(lower(build(name, p, m)), even_costs(p, backward=2, transfer=0.5))
        panels.append(panel_of(found, title=CATALOGUE[name].note))
    return Picture(tuple(panels), "micro-batches", "")


def test_the_page_needs_no_network():
    text = page(two_panels(), "two")
    assert not re.search(r"(src|href)\s*=|@import|https?://|fetch\(", text)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures(tmp_path, suffix, capsys):
    flag = "--svg" if suffix == "svg" else "--png"
    out = tmp_path / f"figure.{suffix}"
    pytest.importorskip("matplotlib")
    assert main(["simulate", "--pp", "4", "--microbatches", "8", flag, str(out)]) == 0
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert out.read_bytes().startswith(heads[suffix])


def test_trace_has_every_op():
    events = chrome_trace(two_panels())["traceEvents"]
    json.dumps(events)
    spans = [e for e in events if e["ph"] == "X" and e["pid"] == 3]
    assert sum(e["cat"] in ("F", "B") for e in spans) == 64
    copies = [e["name"] for e in spans if e["cat"] in ("E", "L")]
    mine = [name for name in copies if " of " not in name]
    assert mine == ["E1", "E3", "L1", "E5", "L3", "E6", "L5", "L6"]
    assert [name for name in copies if " of " in name] == [f"{name} of stage 0" for name in mine]
    assert {e["ph"] for e in events} == {"M", "X", "s", "f", "C"}


@pytest.mark.parametrize("transfer", [0.0, 0.5, 4.0])  # instant, hidden, overlapping one another
def test_every_arrow_begins_and_ends_in_a_slice(transfer):
    """As the trace format binds them: to the slice of that thread that encloses the time."""
    found = simulate(lower(build("bpipe", 8, 16)), even_costs(8, backward=2, transfer=transfer))
    picture = Picture((panel_of(found),), "micro-batches", "")
    events = chrome_trace(picture)["traceEvents"]
    slices = {}
    for event in events:
        if event["ph"] == "X":
            slices.setdefault((event["pid"], event["tid"]), []).append(event)
    arrows = {}
    for event in events:
        if event["ph"] in "sf":
            inside = [
                one["name"].split()[0]
                for one in slices.get((event["pid"], event["tid"]), [])
                if one["ts"] <= event["ts"] < one["ts"] + one["dur"]
            ]
            assert inside == [event["name"]]
            arrows.setdefault(event["id"], []).append((event["ph"], event["tid"], event["ts"]))
    assert len(arrows) == 34
    for (one, source, begun), (other, target, ended) in map(sorted, arrows.values()):
        assert (one, other) == ("f", "s")
        assert ended <= begun  # sorted: f before s
        assert source // 1000 + target // 1000 == 7  # the two of a pair
    for track in slices.values():
        track.sort(key=lambda event: event["ts"])
        for before, after in itertools.pairwise(track):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    names = [(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"]
    assert len(names) == len(set(names))
    assert set(slices) <= set(names)


SHELL = shutil.which("trace_processor_shell") or shutil.which("trace_processor")


@pytest.mark.skipif(SHELL is None, reason="needs Perfetto's trace_processor_shell on the PATH")
def test_perfetto_binds_every_arrow(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(chrome_trace(two_panels(8, 16))))
    query = tmp_path / "query.sql"
    query.write_text("select count(*) as flows from flow where slice_out and slice_in;")
    shown = subprocess.run([SHELL, "-q", query, path], capture_output=True, text=True, check=True)
    assert re.search(r"^34$", shown.stdout, re.MULTILINE), shown.stdout


def test_text_for_any_costs():
    text = draw_panel(two_panels().panels[1], 60, "micro-batches", "")
    lines = text.splitlines()
    assert all(len(line) <= 60 for line in lines[1:-1])
    assert lines[1].startswith("0: 0123......aa4bb5cc6")
    assert lines[1].endswith("3 micro-batches")
    assert ">" in lines[2]
    assert "<" in lines[2]


def test_text_names_each_computation_where_there_is_room():
    lines = draw_panel(two_panels().panels[1], 110, "micro-batches", "").splitlines()
    assert lines[1].startswith("0: F0F1F2F3")
    assert "B0--F4" in lines[1]
    assert max(map(len, lines[1:-1])) <= 110


@pytest.mark.parametrize(
    ("p", "m", "width"), [(16, 64, 260), (8, 16, 100), (3, 5, 45), (4, 30, 150)]
)
def test_text_shows_every_computation_once(p, m, width):
    """The warm-up of the issue: 0 to 15 and not every third of them."""
    panel = two_panels(p, m).panels[0]
    lines = draw_panel(panel, width, "micro-batches", "").splitlines()
    for stage in range(p):
        lane = lines[1 + stage].split(": ")[1].split("  ")[0]
        signs = "".join(sign for sign, _ in itertools.groupby(lane) if sign != ".")
        boxes = [b for b in panel.boxes if b.stage == stage]
        boxes.sort(key=lambda box: box.start)
        wanted = [
            ("abcdefghij" if b.kind == "B" else "0123456789")[b.microbatch % 10] for b in boxes
        ]
        assert signs == "".join(wanted)


def test_text_that_would_be_misread_is_not_drawn():
    said = draw_panel(two_panels(16, 64).panels[0], 120, "micro-batches", "")
    assert "(too narrow to draw: needs 259 columns, has 120; --html draws a page)" in said
    assert "0358035" not in said
    assert "peak 16 micro-batches" in said
    drawn = draw_panel(two_panels(16, 64).panels[0], 259, "micro-batches", "")
    assert " 0: 0123456789012345" in drawn
    assert "too narrow" in draw_panel(two_panels(16, 64).panels[0], 258, "micro-batches", "")


@pytest.mark.parametrize(
    ("name", "budget"), [("1f1b", None), ("bpipe", 3.0), ("interleaved-bpipe", 4.5)]
)
def test_the_budget_stands_where_the_peaks_do(name, budget):
    """4.5 micro-batches: (2 (4 + 4) + 1) / 2 chunks a pair is 8.5, so 9 of 2 a micro-batch."""
    found = simulate(lower(build(name, 4, 8)), even_costs(4, backward=2, transfer=0.5))
    curves = panel_of(found).curves
    assert {curve.budget for curve in curves} == {budget}
    if budget is not None:
        assert max(curve.peak for curve in curves) == budget
    in_bytes = panel_of(found, (StageBytes((600,), weights=50),) * 4).curves
    chunks = found.schedule.chunks
    for curve, sized in zip(curves, in_bytes, strict=True):
        if budget is not None:
            assert sized.budget == pytest.approx(50 + 600 * chunks * budget)
        assert sized.peak == pytest.approx(50 + 600 * chunks * curve.peak)


def test_every_schedule_can_be_drawn():
    for name in CATALOGUE:
        lowered = lower(build(name, 4, 8))
        found = simulate(lowered, even_costs(4, weight=1))
        panel = panel_of(found, (StageBytes((2**30,), weights=2**30),) * 4, time_unit="s")
        picture = Picture((panel,), "bytes", "s")
        assert len(page(picture, name)) > 10_000
        assert draw_panel(panel, 100, "bytes", "s").count("\n") >= 5


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "12.3 ms"), (2.5, "2.5 s"), (1e-5, "0.01 ms")]
)
def test_times(value, text):
    assert time_text(value, "s") == text
    assert memory_text(3.5 * 2**30, "bytes") == "3.5 GiB"


@pytest.mark.parametrize(("bpipe", "v"), [(False, 1), (True, 1), (True, 2)])
def test_a_recording_lies_over_its_prediction(tmp_path, bpipe, v):
    write_report(tmp_path, 4, 8, bpipe, v=v)
    panel = overlay(read_report(tmp_path), "recorded")
    assert panel.ghost is not None
    # chunks' messages are posted without waiting: no recording says what one takes by itself
    near = 1e-6 if v == 1 else 0.02
    assert panel.ghost.end == pytest.approx(panel.end, rel=near)
    for real, predicted in zip(panel.boxes, panel.ghost.boxes, strict=True):
        assert (real.op, real.stage) == (predicted.op, predicted.stage)
        assert real.start == pytest.approx(predicted.start, abs=near)
    for real, predicted in zip(panel.curves, panel.ghost.curves, strict=True):
        assert real.peak == pytest.approx(predicted.peak, rel=1e-6)
    assert [m.op for m in panel.moves] == [m.op for m in panel.ghost.moves]
    assert len(panel.moves) == ({1: 8, 2: 4}[v] if bpipe else 0)
    if bpipe:  # the bound holds, and some stage reaches it
        heights = [(curve.budget, curve.peak) for curve in panel.curves]
        assert all(budget + 1 >= peak for budget, peak in heights)
        assert min(abs(budget - peak) for budget, peak in heights) < 1


def test_an_iteration_by_another_rule_than_the_last_is_not_the_one_drawn(tmp_path):
    stock, balanced = tmp_path / "stock", tmp_path / "balanced"
    for folder in (stock, balanced):
        folder.mkdir()
        write_report(folder, 4, 8, folder == balanced, transfer=0.5)
    seconds = [read_report(folder).seconds for folder in (stock, balanced)]
    assert seconds[0] < seconds[1]
    for first, then in zip(read_timelines(stock, 4), read_timelines(balanced, 4), strict=True):
        both = Timeline(then.stage, then.rank, [*first.iterations, *then.iterations])
        (balanced / both.file_name).write_text(both.text())
    found = read_report(balanced)
    assert found.seconds == seconds[1]
    assert any(seen.op.kind is Kind.EVICT for seen in found.stages[0])


def test_reports_on_the_command_line(tmp_path, capsys):
    write_report(tmp_path, 4, 8, True)
    html = tmp_path / "page.html"
    assert main(["simulate", "--from-report", str(tmp_path), "--html", str(html)]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out
    assert "(+0.0 %)" in out or "(-0.0 %)" in out
    assert html.exists()


def test_folders_that_are_no_reports(tmp_path):
    with pytest.raises(ReportError, match=r"memory.json: No such file.*--bpipe-report"):
        read_report(tmp_path)
    write_report(tmp_path, 4, 8, True)
    (tmp_path / "timeline-stage002-rank00002.json").unlink()
    with pytest.raises(ReportError, match="there is no timeline of stage 2"):
        read_report(tmp_path)
    (tmp_path / "timeline-stage002-rank00002.json").write_text("{}")
    with pytest.raises(ReportError, match="format version None"):
        read_report(tmp_path)
    (tmp_path / "timeline-stage002-rank00002.json").write_text('{"version": 2}')
    with pytest.raises(ReportError, match="not what --bpipe-report writes"):
        read_report(tmp_path)
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(ReportError, match="not JSON"):
        read_report(tmp_path)
