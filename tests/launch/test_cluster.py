"""The rehearsals on real components; each says itself where it cannot run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from scripts.rehearsals.common import CANNOT_RUN
from tests.harness import ROOT

SECONDS = 3600
# what each has looked at when it is through, at least
EXPECTED = {
    "slurm": {"torchrun.sbatch: losses", "srun.sbatch: losses", "requeue: losses"},
    "hosts": {
        "auto: transport",
        "Megatron's order: transport",
        "a host falls silent: the other ends",
    },
    "image": {"doctor", "quickstart: losses"},
}


@pytest.mark.cluster
@pytest.mark.parametrize("name", EXPECTED)
def test_rehearsal(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [str(ROOT / "scripts" / f"rehearse_{name}.sh"), "--report", str(report)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    if process.returncode == CANNOT_RUN:
        pytest.skip(said.strip().splitlines()[-1])
    assert process.returncode == 0, said[-12000:]
    checks = json.loads(report.read_text())
    assert {check["name"] for check in checks} >= EXPECTED[name]
    assert all(check["passed"] for check in checks)
