"""Published runs that nothing was fitted on: how far predictions are off."""

from __future__ import annotations

import json

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.planner.check.compare import Compared, compare, compare_one, error
from megatron_bpipe.planner.check.runs import PublishedRun, published_runs
from megatron_bpipe.planner.check.show import data, table
from megatron_bpipe.planner.uncertainty import KNOWN


@pytest.fixture(scope="module")
def compared() -> tuple[Compared, ...]:
    return compare()


@pytest.mark.parametrize("gpu", ["", "A100-80GB", "H100-80GB", "B200", "GB200"])
def test_seconds_and_memory_are_near_what_was_measured(
    compared: tuple[Compared, ...], gpu: str
) -> None:
    """Seconds within 12 % on average and 25 % at worst, memory within 8 and 15, on every GPU."""
    mine = [c for c in compared if gpu in ("", c.published.gpu)]
    seconds = error(c.seconds_off for c in mine)
    memory = error(c.gib_off for c in mine)
    assert seconds.runs
    assert memory.runs
    assert (seconds.mean < 0.12, seconds.worst < 0.25) == (True, True), seconds
    assert (memory.mean < 0.08, memory.worst < 0.15) == (True, True), memory


def test_what_the_planner_says_of_itself_is_what_comes_out(compared: tuple[Compared, ...]) -> None:
    seconds, memory = error(c.seconds_off for c in compared), error(c.gib_off for c in compared)
    assert KNOWN.runs == len(compared)
    assert (KNOWN.seconds_mean, KNOWN.seconds_worst) == pytest.approx(
        (seconds.mean, seconds.worst), abs=5e-4
    )
    assert (KNOWN.memory_mean, KNOWN.memory_worst) == pytest.approx(
        (memory.mean, memory.worst), abs=5e-4
    )


def test_every_run_is_in_the_table(compared: tuple[Compared, ...]) -> None:
    text, runs = table(compared), data(compared)["runs"]
    assert isinstance(runs, list)
    assert [run["name"] for run in runs] == [run.name for run in published_runs()]
    for run in published_runs():
        assert run.name in text


def quick() -> tuple[PublishedRun, ...]:
    return tuple(run for run in published_runs() if run.source == "golden")[:2]


def test_the_error_can_be_seen() -> None:
    """A run said to have been twice as fast is 100 % off."""
    run = quick()[0]
    assert run.seconds is not None
    true = compare_one(run)
    wrong = Compared(PublishedRun(run.name, run.source, run.gpu, run.run, true.seconds / 2), 2, 1)
    assert wrong.seconds_off == pytest.approx(4 / true.seconds - 1)
    assert wrong.gib_off is None
    assert error([0.1, None, -0.3]).worst == 0.3


@pytest.mark.parametrize("words", [["plan", "--check"], ["tables", "--measured"]])
def test_both_commands_print_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setattr("megatron_bpipe.planner.check.compare.published_runs", quick)
    assert main(words) == 0
    assert "7B t 1 p 4 v 8 d 2" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
