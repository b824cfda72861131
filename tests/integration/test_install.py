"""The ways in: install and uninstall, flags, and the command a user types, under real torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT, Megatron
from tests.harness.models import gpt

TORCHRUN_SECONDS = 240


def test_install_after_import_and_uninstall(megatron: Megatron) -> None:
    result = megatron.script("install_after_import.py", [], world=1)
    assert result.ok, result.logs


def torchrun(arguments: list[str], ranks: int, logs: Path) -> tuple[int, str]:
    """Run torchrun with a time-out; whatever happens, its whole process group ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--log-dir", str(logs), "--nproc-per-node", str(ranks), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TORCHRUN_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


def test_the_command_of_the_readme(megatron: Megatron, tmp_path: Path) -> None:
    """install() before anything of Megatron is imported, as `run` does it."""
    flags = [*gpt(4), *megatron.data, "--train-iters", "3", "--bpipe"]
    script = ROOT / "scripts" / "pretrain_gpt.py"
    run = ["-m", "megatron_bpipe", "run", str(script), *flags, "--bpipe-report", str(tmp_path)]
    status, output = torchrun(run, 4, tmp_path / "torchrun")
    assert status == 0, output[-4000:]
    assert output.count("the CPU stands in for CUDA") == 1
    assert output.count("1F1B with activations balanced") == 1
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert output.count("bpipe: iteration 3: MFU unknown") == 1
    assert memory["bpipe"] is True
    assert memory["budget"] == 3
    assert memory["stages"][0]["evicted_bytes"] > 0
    assert len(memory["losses"]) == 3
