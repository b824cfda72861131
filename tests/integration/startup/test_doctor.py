"""The doctor says what it found, and its exit status says whether --bpipe can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def doctor(*arguments: str, path: Path | None = None) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT)}
    command = [sys.executable, "-m", "megatron_bpipe", "doctor", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_here_it_can_run_and_the_softmax_trap_is_named() -> None:
    status, out, _ = doctor("--json", "--heads", "104", "--tp", "4", "--micro-batch", "1")
    report = json.loads(out)
    assert status == 0
    assert report["can_run"] is True
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["schedule hook points"]["ok"]
    assert "0.19.2" in found["megatron-core"]["found"]
    assert found["transport shm"]["ok"]
    trap = found["fused softmax"]  # GPT-3 96B, table 3 row 7: 26 heads a rank
    assert not trap["ok"]
    assert "26" in trap["found"]
    assert "flash attention" in trap["remedy"]


def test_a_megatron_that_lacks_a_hook_point_cannot(tmp_path: Path) -> None:
    package = tmp_path / "megatron" / "core" / "pipeline_parallel"
    package.mkdir(parents=True)
    for folder in (package.parents[1], package.parent, package):
        (folder / "__init__.py").touch()
    (package / "schedules.py").write_text("def forward_step(data_iterator): ...\n")
    status, out, _ = doctor(path=tmp_path)
    assert status == 1
    assert "MISSING schedule hook points" in out
    assert "schedules.backward_step" in out
    assert "use a supported release" in out
    assert out.rstrip().endswith("--bpipe cannot run here")


def test_heads_that_do_not_divide() -> None:
    status, _, error = doctor("--heads", "10", "--tp", "4")
    assert status == 2
    assert error.strip().splitlines()[-1] == "doctor: --heads 10 is not divisible by --tp 4"
