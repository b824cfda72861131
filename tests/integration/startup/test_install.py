"""The ways in: install and uninstall, flags, and the command a user types, under real torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.torchrun import torchrun
from tests.harness import ROOT, Megatron
from tests.harness.models import gpt

TORCHRUN_SECONDS = 240


def test_install_after_import_and_uninstall(megatron: Megatron) -> None:
    result = megatron.script("install_after_import.py", [], world=1)
    assert result.ok, result.logs


@pytest.mark.trains
def test_the_command_of_the_readme(megatron: Megatron, tmp_path: Path) -> None:
    """install() before anything of Megatron is imported, as `run` does it."""
    flags = [*gpt(4), *megatron.data, "--train-iters", "3", "--bpipe"]
    script = ROOT / "scripts" / "examples" / "pretrain_gpt.py"
    run = ["-m", "megatron_bpipe", "run", str(script), *flags, "--bpipe-report", str(tmp_path)]
    # the data loader's workers leave a socket in the folder for temporary files
    status = torchrun(run, 4, TORCHRUN_SECONDS, tmp_path / "log", {"TMPDIR": str(tmp_path)})
    output = (tmp_path / "log").read_text()
    assert status == 0, output[-4000:]
    assert output.count("the CPU stands in for CUDA") == 1
    assert output.count("1F1B with activations balanced") == 1
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert "MFU" not in output  # a CPU has no known peak
    assert output.count("\n    0         4 -> 3") == 1  # what stock would hold, what was held
    assert memory["bpipe"] is True
    assert memory["budget"] == 3
    assert memory["stages"][0]["evicted_bytes"] > 0
    assert len(memory["losses"]) == 3
