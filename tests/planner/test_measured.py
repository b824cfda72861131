"""Measured-peak mode on reports written by hand (real runs: tests/training/test_planner.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.planner.measured import (
    MIB,
    best,
    measured_balance,
    proposals,
    read_report,
    recomputed_shares,
)
from megatron_bpipe.report.run import RunReport, StageReport


def report(
    folder: Path, static: list[int], unit: list[int], working: list[int], **changes: Any
) -> Path:
    """memory.json of a stock run, p = len(static), figures in MiB."""
    p = len(static)
    stages = []
    for x in range(p):
        own = (p - x) * unit[x]
        stages.append(
            StageReport(
                stage=x,
                rank=x,
                own_activation_bytes=own * MIB,
                own_microbatches=p - x,
                static_bytes=static[x] * MIB,
                allocator_peak_bytes=(own + working[x]) * MIB,
            )
        )
    run = RunReport(False, None, p, 4 * p, 1, tuple(stages), [], [])
    (folder / "memory.json").write_text(replace(run, **changes).text())
    return folder


EVEN = ([10] * 4, [10] * 4, [2] * 4)
HEAVY_HEAD = ([10, 10, 10, 10], [10] * 4, [0, 0, 0, 60])


def test_stock_is_what_was_measured_and_bpipe_what_the_paper_says(tmp_path: Path) -> None:
    found = proposals(read_report(report(tmp_path, *EVEN)), micro_batches=8)
    assert [q.budget for q in found] == [None, 3]
    assert [t / MIB for t in found[0].totals] == [52, 42, 32, 22]
    # stage 0 keeps 3 of 4, stage 3 its own one and two slots
    assert [t / MIB for t in found[1].totals] == [42, 42, 32, 42]
    assert best(found, None).budget == 3
    assert best(found, 52 * MIB).budget is None
    assert best(found, 45 * MIB).budget == 3
    assert best(found, 30 * MIB).budget == 3  # does not fit; nothing is lower


def test_a_last_stage_full_of_logits_is_the_tightest(tmp_path: Path) -> None:
    run = read_report(report(tmp_path, *HEAVY_HEAD))
    found = proposals(run, micro_batches=8)
    assert found[0].tightest == 3
    assert best(found, None).budget is None  # lending would make it worse
    lending = measured_balance(run, None)
    assert not lending.loans  # stage 3 is the fullest, and has nothing that could leave
    assert [peak / MIB for peak in lending.peaks] == [50, 40, 30, 80]
    assert recomputed_shares(run, 50 * MIB)[3] == pytest.approx((80 - 50) / 10)  # never enough


def test_recomputation_is_for_the_stages_that_do_not_fit(tmp_path: Path) -> None:
    run = read_report(report(tmp_path, *EVEN))
    assert recomputed_shares(run, 42 * MIB) == pytest.approx([10 / 40, 0, 0, 0])
    assert recomputed_shares(run, 60 * MIB) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("stages"), r"stages is missing"),
        (lambda d: d["stages"][1].pop("static_bytes"), r"stages\[1\].static_bytes is missing"),
        (lambda d: d["stages"][2].update(own_microbatches=0), r"stages\[2\].own_microbatches is 0"),
        (lambda d: d["stages"][0].update(pool_bytes="x"), r"stages\[0\].pool_bytes is 'x'"),
        (
            lambda d: d["stages"][3].update(allocator_peak_bytes=None),
            "peak_bytes is null",
        ),
        (lambda d: d.update(version=1), "format version 1, this reads 2"),
    ],
)
def test_a_bad_report_names_its_field(tmp_path: Path, change: Any, named: str) -> None:
    path = report(tmp_path, *EVEN) / "memory.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(EstimateError, match=named):
        read_report(tmp_path)


def test_the_command_says_it_in_words_and_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(tmp_path, *EVEN)
    assert main(["plan", "--from-report", str(tmp_path), "--memory", "45MiB"]) == 0
    said = capsys.readouterr().out
    assert "tightest: stage 0 with 52.0 MiB, most of it activations" in said
    assert "--bpipe --bpipe-budget 3 takes the fullest stage from 52.0 to 42.0 MiB" in said
    assert "whole layers of 18% of stage 0" in said  # 7 of 40 MiB
    assert main(["plan", "--from-report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--memory", "4 parsecs"], "4 parsecs"),
        (["--microbatches", "0"], "--microbatches 0"),
    ],
)
def test_bad_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    report(tmp_path, *EVEN)
    assert main(["plan", "--from-report", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--from-report", str(tmp_path)]) == 2
    assert "--bpipe-report" in capsys.readouterr().err
