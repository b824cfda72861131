"""A checkpoint written under one placement loads under the other, bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, Megatron
from tests.harness.models import gpt
from tests.launch.stand_in import SLURM, job, run

ORDERS = ("megatron", "pair-adjacent")
TWO_NODES_OF_TWO = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_GPUS_ON_NODE": "2",
}


@pytest.mark.long
@pytest.mark.parametrize(("saved", "loaded"), [ORDERS, ORDERS[::-1]])
def test_resume_under_the_other_placement(
    megatron: Megatron, tmp_path: Path, saved: str, loaded: str
) -> None:
    def losses(placement: str, *more: str) -> Any:
        """Train to the fourth step: the losses of this run's steps."""
        report = tmp_path / placement
        flags = [*gpt(4), *megatron.data, "--train-iters", "4", "--ckpt-format", "torch_dist"]
        flags += ["--bpipe", "--bpipe-placement", placement, "--bpipe-report", str(report), *more]
        command = [
            str(SLURM / "srun.sbatch"),
            str(ROOT / "scripts" / "examples" / "pretrain_gpt.py"),
            *flags,
        ]
        status, output = run(command, job("srun.sbatch", **TWO_NODES_OF_TWO), 600)
        assert status == 0, output[-6000:]
        assert output.count("2 of 2          0 of 2") == (placement == "pair-adjacent")
        return json.loads((report / "memory.json").read_text())["losses"]

    checkpoints = str(tmp_path / "checkpoints")
    first = losses(saved, "--save", checkpoints, "--save-interval", "2")
    second = losses(loaded, "--load", checkpoints, "--ckpt-step", "2")
    assert len(first) == 4
    assert second == first[2:]
