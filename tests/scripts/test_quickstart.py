"""The quickstart: what a new user sees first."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.examples import progress
from tests.harness import ROOT

EXAMPLES = ROOT / "scripts" / "examples"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("stock", 16) as shown:
        shown.add(3)
        shown.note("iteration 1/8  loss 5.0")
    assert capsys.readouterr().out == "stock ...\nstock: iteration 1/8  loss 5.0  (0 s)\n"


def test_a_bar_that_moves_within_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with progress.Progress("stock", 16) as shown:
        shown._bar.mininterval = 0
        for _ in range(8):
            shown.add(1)
        shown.to(4)  # never back
        shown._bar.refresh()
        assert " 50%" in terminal.getvalue().split("\r")[-1]
        shown.add(100)  # never beyond
    assert "100%" in terminal.getvalue()
    assert "112%" not in terminal.getvalue()


def test_a_bar_that_did_not_get_there_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    def fail() -> None:
        with progress.Progress("stock", 16) as shown:
            shown.add(4)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert "100%" not in terminal.getvalue()


@pytest.fixture
def out() -> Iterator[Path]:
    folder = ROOT / "runs" / "quickstart-of-the-tests"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
@pytest.mark.trains
def test_losses_are_identical_and_the_time_is_said_before(out: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import quickstart; "
        "quickstart.OUT = Path(sys.argv.pop()); sys.exit(quickstart.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--iterations", "3", str(out)],
        cwd=EXAMPLES, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"quickstart: will take about (\d+ min )?\d+0 s", lines[1])
    for name in ("stock", "bpipe"):
        assert sum(line.startswith(f"{name}: iteration 3/3  loss ") for line in lines) == 1
    assert "losses identical: yes, bitwise (3 iterations)" in lines
    assert (out / "memory.png").stat().st_size > 10_000
