"""Two recorded runs compared: what is said, what is drawn, and the status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.simulate.recorded.compare import compare
from megatron_bpipe.simulate.recorded.exposure import LATE, LONG
from megatron_bpipe.simulate.recorded.losses import compare_losses
from tests.simulate.reports import write_report

BITS = [["0x1.8p+1", "0x1p+4"], ["0x1.4p+1", "0x1p+4"]]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    stock, bpipe = tmp_path / "stock", tmp_path / "bpipe"
    for folder in (stock, bpipe):
        folder.mkdir()
    write_report(stock, 4, 8, False, losses=BITS, flags=["--lr", "1e-3", "--bpipe-report", "a"])
    flags = ["--lr", "1e-3", "--bpipe", "--bpipe-report", "b"]
    write_report(bpipe, 4, 8, True, losses=BITS, slower=1.02, flags=flags)
    return stock, bpipe


def test_what_the_command_says(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", *map(str, folders)]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    stages = [row for row in rows if row and row[0] in "0123" and row[2] == "->"]
    assert [(row[1], row[3]) for row in stages] == [("4", "3"), ("3", "3"), ("2", "2"), ("1", "3")]
    # stage 0: 4 MiB fall to 3; stage 3: its own one and two slots lent
    assert [row[4:6] for row in stages] == [
        *(["4.0", "3.0"], ["3.0", "3.0"], ["2.0", "2.0"], ["1.0", "3.0"]),
    ]
    assert "-1.0 (-25 %)" in said
    assert "flags of B only: --bpipe" in said
    assert "flags of A only" not in said
    assert "ratio 1.020 (1.020 to 1.020)" in said
    assert "losses identical: yes, bitwise (2 iterations)" in said


def test_one_bit_gives_status_1(folders: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    stock, bpipe = folders
    other = [BITS[0], ["0x1.4000000000001p+1", "0x1p+4"]]
    write_report(bpipe, 4, 8, True, losses=other)
    assert main(["compare", str(stock), str(bpipe)]) == 1
    said = capsys.readouterr().out
    assert (
        "losses identical: NO, first at iteration 2: 2.5 (0x1.4p+1) and 2.5000000000000004" in said
    )


@pytest.mark.parametrize(
    ("a", "b", "identical", "named"),
    [
        (BITS, BITS, True, "2 iterations"),
        (BITS[:1], BITS[:1], True, "1 iteration)"),
        (BITS, BITS[:1], False, "the first 1 are, but A has 2 iterations and B 1"),
        (BITS, [], False, "B recorded none"),
        ([], [], False, "A recorded none"),
        ([["0x0.0p+0"]], [["-0x0.0p+0"]], False, "0.0"),
        (BITS, [BITS[0], BITS[1][:1]], False, "2 and 1 numbers"),
    ],
)
def test_losses(a: list, b: list, identical: bool, named: str) -> None:
    found = compare_losses(a, b)
    assert found.identical is identical
    assert named in found.said


@pytest.mark.parametrize(
    ("transfer", "why"),
    [
        (0.05, None),  # half a forward: hidden
        (0.5, LONG),  # five forwards
    ],
)
def test_what_was_exposed_and_why(tmp_path: Path, transfer: float, why: str | None) -> None:
    for name, bpipe in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, 4, 8, bpipe, transfer=transfer, losses=BITS)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.exposures(0) == []
    exposed = found.exposures(1)
    assert {one.stage for one in exposed} <= {0}  # the only evictor at this budget
    if why is None:
        assert sum(one.exposed for one in exposed) < 0.01
        return
    assert {one.why for one in exposed} <= {LONG, LATE}
    loads = next(one for one in exposed if one.kind is Kind.LOAD)
    assert loads.why == why
    assert loads.copy == pytest.approx(transfer)
    assert loads.exposed > loads.count * 0.05
    assert "loads of 1 MiB, 500 ms each" in found.text()
    assert why in found.text()


def test_pages_figures_and_data(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    page, figure = tmp_path / "page.html", tmp_path / "memory.png"
    words = ["compare", *map(str, folders), "--html", str(page), "--png", str(figure), "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["identical"] is True
    assert said.err == f"written: {page}\nwritten: {figure}\n"
    assert '"both":true' in page.read_text()
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert compare(*folders)._repr_html_().startswith("<iframe srcdoc=")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--html", "page.txt"], "--html page.txt: the name must end in .html"),
        (["--png", "nowhere/a.png"], "--png nowhere/a.png: there is no folder nowhere"),
    ],
)
def test_output_is_looked_at_first(words: list[str], named: str, capsys) -> None:
    assert main(["compare", "no-such-a", "no-such-b", *words]) == 2
    assert named in capsys.readouterr().err


def test_runs_are_called_what_tells_them_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "report"
        folder.mkdir(parents=True)
        write_report(folder, 2, 2, False, losses=BITS)
    assert compare(tmp_path / "one" / "report", tmp_path / "two" / "report").names == ("one", "two")
    again = tmp_path / "one" / "report"
    assert compare(again, again).names == (str(again), str(again))


def test_runs_that_cannot_be_compared(folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    stock, _ = folders
    assert main(["compare", str(stock), str(tmp_path / "none")]) == 2
    assert "none/memory.json: No such file" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    write_report(other, 8, 8, True)
    with pytest.raises(ReportError, match=r"has 4 stages, .* has 8"):
        compare(stock, other)
