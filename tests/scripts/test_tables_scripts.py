"""The scripts for the paper's tables: settings, command lines, collected results."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bpipe.estimate.paper.published import EXPERIMENTS, GLOBAL_BATCH, LAYOUT
from megatron_bpipe.estimate.time.flops import equation_1, layer_flops_equation_1
from tests.harness import ROOT, Megatron

SCRIPTS = ROOT / "scripts" / "reproduction"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules: ``.rows``, ``.run`` and ``.collect``."""
    sys.path.insert(0, str(SCRIPTS))
    import collect
    import run_table
    import table_rows

    yield SimpleNamespace(rows=table_rows, run=run_table, collect=collect)
    sys.path.remove(str(SCRIPTS))


def run_table(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "run_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_settings_are_the_papers(scripts: Any) -> None:
    rows = scripts.rows.load_rows()
    assert [row.name for row in rows] == [
        f"table{table}-{e.id:02d}" for table in (3, 5) for e in EXPERIMENTS
    ]
    for row, e in zip(rows, [*EXPERIMENTS, *EXPERIMENTS], strict=True):
        assert (row.model, row.micro_batch, row.attention) == (e.model, e.micro_batch, e.attention)
        assert row.global_batch == GLOBAL_BATCH
        assert row.tensor_parallel == LAYOUT.tp
        if row.table == 3:
            assert (row.bpipe, row.published_mfu) == (e.bpipe, e.mfu)
            assert row.pipeline_parallel == LAYOUT.pp
        else:
            assert (row.bpipe, row.published_mfu) == (False, e.stage_mfu)
            assert (row.pipeline_parallel, row.stage_of) == (1, LAYOUT.pp)


def test_dry_run_prints_every_row_on_one_line() -> None:
    done = run_table("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 20
    for line, e in zip(lines, [*EXPERIMENTS, *EXPERIMENTS], strict=True):
        words = shlex.split(line)
        assert words[words.index("--micro-batch-size") + 1] == str(e.micro_batch)
    assert sum("--bpipe" in line.split() for line in lines) == 4
    assert sum("--standalone --nproc-per-node 4" in line for line in lines) == 10
    assert sum("--nnodes 4" in line and "--nproc-per-node 8" in line for line in lines) == 10
    assert len(run_table("--dry-run", "--one-gpu").stdout.splitlines()) == 10


def test_slurm_lines() -> None:
    (line,) = run_table("table3-08", "--dry-run", "--launcher", "slurm").stdout.splitlines()
    words = shlex.split(line)
    assert words[0] == "sbatch"
    assert "--nodes 4 --ntasks-per-node 1 --gpus-per-node 8" in line
    (script,) = [Path(word) for word in words if word.endswith(".sbatch")]
    assert script.is_file()
    more = ("--launcher", "slurm", "--style", "gpu", "--sbatch=--partition=big")
    (line,) = run_table("table5-08", "--dry-run", *more).stdout.splitlines()
    assert "--nodes 1 --ntasks-per-node 4 --gpus-per-node 4" in line
    assert line.index("--partition=big") < line.index("srun.sbatch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table3-11", "--dry-run"], "no row 'table3-11': choose from table3-01"),
        (["table3-01", "--dry-run", "--one-gpu"], "only single-stage rows fit on one GPU"),
        (["table3-01", "--dry-run", "--gpus-per-node", "5"], "5 GPUs per node do not divide"),
        (["table3-01", "--dry-run", "--iterations", "2"], "--iterations 2"),
        ([], "name the rows"),
    ],
)
def test_wrong_requests_are_one_line(arguments: list[str], message: str) -> None:
    done = run_table(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_row_runs_and_its_log_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in torchrun: the log, the output and the exit status come through."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\necho "started $*"\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = run_table("table5-01", "--one-gpu", "--out", str(tmp_path / "out"))
    assert done.returncode == 7
    (log,) = (tmp_path / "out" / "table5-01-one-gpu").glob("node-*.log")
    assert log.read_text().startswith("started --standalone --nproc-per-node 1")
    assert log.read_text() in done.stdout


def test_megatron_takes_every_line(megatron: Megatron, scripts: Any) -> None:
    """Each rendered line passes Megatron's parser and its checks of the arguments."""
    backends = {"none": "unfused", "recompute": "unfused", "flash": "flash"}
    cases = []
    for row in scripts.rows.load_rows():
        for one_gpu in (False, True) if row.stage_of else (False,):
            share = row.tensor_parallel if one_gpu else 1
            expected = {
                "hidden_size": row.sizes.hidden,
                "num_attention_heads": row.sizes.heads // share,
                "ffn_hidden_size": row.sizes.ffn // share,
                "kv_channels": row.sizes.hidden // row.sizes.heads,
                "num_layers": 80 // (row.stage_of or 1),
                "attention_backend": backends[row.attention],
                "recompute_granularity": "selective" if row.attention == "recompute" else None,
                "sequence_parallel": not one_gpu,
                "bpipe": row.bpipe,
                "data_parallel_size": 1,
                "global_batch_size": 128,
                "micro_batch_size": row.micro_batch,
            }
            if row.attention == "recompute":
                expected["recompute_modules"] = ["core_attn"]
            # as run_table starts it
            argv = ["CUDA_DEVICE_MAX_CONNECTIONS=1", *scripts.rows.flags(row, one_gpu=one_gpu)]
            cases.append({"argv": argv, "gpus": row.gpus(one_gpu), "expected": expected})
    assert len(cases) == 30
    result = megatron.script("parse_command_lines.py", [json.dumps(cases)], world=1)
    assert result.ok, result.logs


LOG = """\
[Rank 0] (after 1 iterations) memory (MB) | allocated: 1.00 | max allocated: 51200.00 | reserved: 1
[Rank 1] (after 1 iterations) memory (MB) | allocated: 1.00 | max allocated: 52224.00 | reserved: 1
[Rank 28] (after 1 iterations) memory (MB) | allocated: 1.00 | max allocated: 20480.5 | reserved: 1
"""


def iterations(milliseconds: list[float]) -> str:
    return "\n".join(
        f" [2026-01-01 00:00:00.000000] iteration {step:8d}/{20:8d} | consumed samples: "
        f"{128 * step:12d} | elapsed time per iteration (ms): {ms:.1f} | throughput per GPU "
        "(TFLOP/s/GPU): 140.0 | learning rate: 1.0E-04 |"
        for step, ms in enumerate(milliseconds, start=1)
    )


def test_collect_measures_by_equation_1(scripts: Any) -> None:
    row = next(row for row in scripts.rows.load_rows() if row.name == "table3-08")
    log = LOG + iterations([99000, 50000, 42000, 40000, 41000, 39000])
    found = scripts.collect.read_log(row, log, 312e12, one_gpu=False)
    assert found.status == "ok"
    assert found.seconds == 40.0
    assert found.mfu == pytest.approx(100 * equation_1(row.sizes, 128) / (40.0 * 32 * 312e12))
    assert found.peak_gib[0] == 51.0
    assert found.peak_gib[1:7] == (None,) * 6
    assert found.peak_gib[7] == pytest.approx(20.0, abs=0.01)


def test_a_stage_on_one_gpu_has_its_share_of_flops(scripts: Any) -> None:
    row = next(row for row in scripts.rows.load_rows() if row.name == "table5-04")
    whole = layer_flops_equation_1(row.sizes, 128) / 8
    assert row.flops() == pytest.approx(whole)
    assert row.flops(one_gpu=True) == pytest.approx(whole / 4)
    log = iterations([30000.0] * 6)
    group, one = (scripts.collect.read_log(row, log, 312e12, one_gpu=o) for o in (False, True))
    assert group.mfu == pytest.approx(one.mfu)


def test_collect_prints_oom_as_oom(scripts: Any, tmp_path: Path) -> None:
    def write(row: str, name: str, text: str) -> None:
        (tmp_path / row).mkdir(exist_ok=True)
        (tmp_path / row / name).write_text(text)

    write("table3-01", "slurm-7.log", iterations([1e4] * 6))
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    write("table3-02", "node-a.log", LOG)
    write("table3-02", "node-b.log", oom)
    write("table3-03", "slurm-8.log", "Traceback (most recent call last):\n")
    write("table5-01-one-gpu", "node-a.log", iterations([3e4] * 6))
    command = [sys.executable, str(SCRIPTS / "collect.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert len(lines) == 22  # the head, 20 rows, one of them on one GPU too
    assert " OOM " in lines["table3-02"]
    assert " failed " in lines["table3-03"]
    assert "not run" in lines["table3-04"]
    assert "10.00" in lines["table3-01"]
    assert "30.00" in lines["table5-01 (one GPU)"]


def test_collect_names_what_it_cannot_use(tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path / "none")], "no folder"),
        ([str(tmp_path), "--gpu", "V100"], "V100"),
        ([str(tmp_path), "--peak-tflops", "0"], "--peak-tflops 0"),
    ):
        command = [sys.executable, str(SCRIPTS / "collect.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert message in done.stderr
