"""The Slurm scripts, driven by a stand-in srun: two "nodes" of four on this machine.

Short tests replace the training by a shell script that says what it was given; the rehearsal (long)
trains PP 4 x DP 2 on the CPU and compares the losses with torchrun's.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT, Megatron
from tests.harness.models import gpt
from tests.launch.stand_in import SLURM, STYLES, job, run

LAUNCH_SECONDS = 900


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """Stands in for Python: prints its variables and words, ends with $STATUS on task $FAILS."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\n"
        'echo "task=$SLURM_PROCID rank=$RANK local=$LOCAL_RANK world=$WORLD_SIZE'
        ' of=$LOCAL_WORLD_SIZE at=$MASTER_ADDR:$MASTER_PORT $*"\n'
        '[ "$SLURM_PROCID" = "$FAILS" ] && exit "$STATUS"\n'
        '[ -n "$FAILS" ] && sleep 300\n'
        "exit 0\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_one_task_a_node_starts_torchrun_with_a_common_rendezvous(interpreter: Path) -> None:
    environ = job("torchrun.sbatch", BPIPE_PYTHON=str(interpreter), SLURM_JOB_ID="41000")
    script = str(SLURM / "torchrun.sbatch")
    status, output = run([script, "pretrain_gpt.py", "--lr", "1 e"], environ, 30)
    assert status == 0, output
    lines = output.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "-m torch.distributed.run --nnodes 2 --nproc-per-node 4" in line
        assert "--rdzv-endpoint localhost:21000 --rdzv-id 41000-0" in line
        assert line.endswith("-m megatron_bpipe run pretrain_gpt.py --lr 1 e")
    requeued = environ | {"SLURM_RESTART_COUNT": "2", "BPIPE_GPUS_PER_NODE": "3"}
    _, output = run([script, "x"], requeued, 30)
    assert "--nproc-per-node 3" in output
    assert "--rdzv-endpoint localhost:21002 --rdzv-id 41000-2" in output


def test_one_task_a_gpu_sets_what_megatron_reads(interpreter: Path) -> None:
    environ = job("srun.sbatch", BPIPE_PYTHON=str(interpreter), SLURM_JOB_ID="41000")
    more = {"BPIPE_SRUN_ARGS": "--container-image=/images/bpipe.sqsh"}
    status, output = run([str(SLURM / "srun.sbatch"), "x", "--bpipe"], environ | more, 30)
    assert status == 0, output
    assert sorted(output.splitlines()) == [
        f"task={task} rank={task} local={task % 4} world=8 of=4 at=localhost:21000 "
        "-m megatron_bpipe run x --bpipe"
        for task in range(8)
    ]


@pytest.mark.parametrize("style", STYLES)
def test_a_failing_task_ends_the_job_with_its_status(style: str, interpreter: Path) -> None:
    environ = job(style, BPIPE_PYTHON=str(interpreter), FAILS="1", STATUS="37")
    status, output = run([str(SLURM / style), "x"], environ, 90)  # the others sleep
    assert status == 37, output


@pytest.mark.parametrize("style", STYLES)
def test_wrong_use_is_explained(style: str) -> None:
    status, output = run([str(SLURM / style)], job(style), 30)
    assert status == 2
    assert "give a training script" in output
    environ = job(style)
    del environ["SLURM_JOB_NODELIST"]
    status, output = run([str(SLURM / style), "x"], environ, 30)
    assert status != 0
    assert "start it with sbatch" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_NTASKS": "7"}, "7 tasks on 2 nodes: give --ntasks-per-node"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "4 tasks but 8 GPUs on a node"),
    ],
)
def test_tasks_that_do_not_fill_the_nodes(changed: dict[str, str], message: str) -> None:
    status, output = run([str(SLURM / "srun.sbatch"), "x"], job("srun.sbatch", **changed), 30)
    assert status == 2
    assert message in output


@pytest.fixture(scope="module")
def rehearsal(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Training of three steps by each launcher: name -> (memory.json, output).

    torchrun in Megatron's order on one node, the Slurm scripts with pairs on one node of two.
    """
    folder = tmp_path_factory.mktemp("rehearsal")
    script = str(ROOT / "scripts" / "examples" / "pretrain_gpt.py")
    flags = [*gpt(4, microbatches=16), *megatron.data, "--train-iters", "3", "--bpipe"]

    def train(
        name: str, start: list[str], environ: dict[str, str], placement: str
    ) -> tuple[Any, str]:
        more = ["--bpipe-report", str(folder / name)]
        more += ["--bpipe-placement", placement]
        status, output = run([*start, script, *flags, *more], environ, LAUNCH_SECONDS)
        assert status == 0, output[-6000:]
        return json.loads((folder / name / "memory.json").read_text()), output

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "8", "-m", "megatron_bpipe", "run"]
    results = {"torchrun": train("torchrun", torchrun, job("srun.sbatch"), "megatron")}
    for style in STYLES:
        results[style] = train(style, [str(SLURM / style)], job(style), "pair-adjacent")
    return results


@pytest.mark.long
@pytest.mark.parametrize("style", STYLES)
def test_same_losses_as_torchrun(rehearsal: Any, style: str) -> None:
    stock, found = rehearsal["torchrun"][0], rehearsal[style][0]
    assert len(found["losses"]) == 3
    assert found["losses"] == stock["losses"]
    assert found["stages"][0]["evicted_bytes"] > 0


@pytest.mark.long
@pytest.mark.parametrize("style", STYLES)
def test_placement_is_realised(rehearsal: Any, style: str) -> None:
    output = rehearsal[style][1]
    assert output.count("pairs (evictor, acceptor)  4 of 4          0 of 4") == 1
