"""The Slurm scripts without Slurm: see fake_slurm/srun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT

SLURM = ROOT / "scripts" / "examples" / "slurm"
STYLES = {"torchrun.sbatch": 1, "srun.sbatch": 4}  # tasks a node


def job(style: str, **more: str) -> dict[str, str]:
    """The environment of a batch script on two nodes with four GPUs each."""
    fake = Path(__file__).parent / "fake_slurm"
    tasks = STYLES[style]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return keep | {
        "PATH": f"{fake}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "BPIPE_PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": str(2 * tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_GPUS_ON_NODE": "4",
        **more,
    }


def run(command: list[str], environ: dict[str, str], seconds: float) -> tuple[int, str]:
    """Run with a time-out; whatever happens, everything it started ends."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
    return process.returncode, output
