"""The one command for a GPU says so where there is none; what its figures are made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rehearsal import _fits, _ratios, _speeds, _stage_ratios
from benchmarks.table5 import command, rows
from benchmarks.torchrun import torchrun
from megatron_bpipe.estimate.models import model_named
from megatron_bpipe.estimate.profile import Device, Profile, StageRow, Timing
from tests.harness import ROOT

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}


def test_without_a_gpu_it_is_skipped(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "gpu_session.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        command, env=os.environ | HIDDEN, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 77
    assert done.stdout == "no CUDA device: skipped\n"
    assert (tmp_path / "out" / "summary.txt").read_text() == done.stdout


@pytest.mark.parametrize("name", ["gpu_probe.py", "copies.py", "rehearsal.py", "table5.py"])
def test_benchmarks_are_skipped_too(name: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / name)]
    done = subprocess.run(
        command, env=os.environ | HIDDEN, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 77, done.stderr
    assert "no CUDA device" in done.stdout


ROWS = [
    {"mode": "stock", "micro_batch": 1, "seconds_per_iteration": 2.0, "stage_peak_bytes": [4, 1]},
    {"mode": "ipc", "micro_batch": 1, "seconds_per_iteration": 2.1, "stage_peak_bytes": [3, 3]},
    {"mode": "stock", "micro_batch": 2, "error": "OutOfMemoryError", "out_of_memory": True},
    {"mode": "ipc", "micro_batch": 2, "seconds_per_iteration": 4.0, "stage_peak_bytes": [6, 6]},
]


def test_time_is_compared_at_equal_micro_batch() -> None:
    assert _ratios(ROWS) == {"ipc, micro-batch 1": pytest.approx(1.05)}


def test_in_turns_each_stage_is_compared_with_itself() -> None:
    stock = {"mode": "stock", "micro_batch": 1, "stage_turns_s": [1.0, 2.0]}
    ipc = {"mode": "ipc", "micro_batch": 1, "stage_turns_s": [1.1, 2.0]}
    assert _stage_ratios([stock, ipc]) == {"ipc, micro-batch 1": [pytest.approx(1.1), 1.0]}


def test_whether_it_fits_is_up_to_the_fullest_stage() -> None:
    assert [_fits(row, 4) for row in ROWS] == [True, True, False, False]
    assert [_fits(row, 3) for row in ROWS] == [False, True, False, False]
    assert _speeds(ROWS, {"stock": 1, "ipc": 2}) == {"stock": 4.0, "ipc": 4.0}


def test_a_failure_for_another_reason_is_not_taken_for_want_of_memory() -> None:
    late = {"mode": "ipc", "micro_batch": 3, "error": "not over", "out_of_memory": False}
    with pytest.raises(RuntimeError, match="ipc, micro-batch 3: not over"):
        _fits(late, 6)


def test_a_run_that_takes_too_long_leaves_no_rank(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    words = [str(script), str(tmp_path)]
    assert torchrun([*words, "0"], 2, 60, tmp_path / "log", {}) == 0
    assert torchrun([*words, "60"], 2, 5, tmp_path / "log", {}) is None
    for rank in "01":
        assert not Path("/proc", (tmp_path / rank).read_text()).exists()


def test_table_5_beside_what_was_measured_here() -> None:
    second = Timing(1.0, 1.0, 1.0, 5)
    profile = Profile(
        model=model_named("GPT-3 96B"),
        tp=4,
        sequence_parallel=True,
        ep=1,
        element=2,
        layers=10,
        device=Device("a GPU", 1e15, "datasheet", 2**37),
        stage=(
            StageRow(1, "recompute", second, second, 2**30, 41.0),
            StageRow(2, "recompute", failure="out of memory"),
            StageRow(1, "flash", second, second, 2**29, 50.0),
        ),
        head=(),
    )
    row7, row8, row9, row10 = rows("GPT-3 96B", profile)
    assert (row7["id"], row7["paper_a100_mfu"], row7["mfu"], row7["seconds"]) == (
        7,
        37.8,
        41.0,
        2.0,
    )
    assert row8["failure"] == "out of memory"
    assert (row9["attention"], row9["bytes"]) == ("flash", 2**29)
    assert row10["failure"] == "not measured"


def test_one_profile_has_all_stages_of_a_model() -> None:
    words = command("LLaMA 65B", Path("p.json"), 5)
    assert words[words.index("--micro-batches") + 1] == "1,2,4"
    assert words[words.index("--attention") + 1] == "none,recompute,flash"
    assert words[words.index("--tensor-model-parallel-size") + 1] == "4"
