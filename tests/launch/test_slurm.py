"""What the Slurm scripts ask of srun, with a stand-in for it and a shell script as the training.

Training on a real Slurm is in test_cluster.py.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.launch.stand_in import SLURM, STYLES, job, run


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """Stands in for Python: prints its variables and words, ends with $STATUS on task $FAILS.

    That one fails when all have started, as the others may be ended before they begin otherwise.
    """
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\n"
        'echo "task=$SLURM_PROCID rank=$RANK local=$LOCAL_RANK world=$WORLD_SIZE'
        ' of=$LOCAL_WORLD_SIZE at=$MASTER_ADDR:$MASTER_PORT $*"\n'
        'echo "rank 3, stage 3" >"${BPIPE_IDENTITY_FILE:-/dev/null}"\n'
        ': >"$0.$SLURM_PROCID"\n'
        'if [ "$SLURM_PROCID" = "$FAILS" ]; then\n'
        '  while [ "$(ls "$0".* | wc -l)" -lt "$SLURM_NTASKS" ]; do sleep 0.1; done\n'
        '  exit "$STATUS"\n'
        "fi\n"
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
    started = output.split("task=")[1:]
    assert len(started) == 2
    for one in started:
        assert "-m torch.distributed.run --nnodes 2 --nproc-per-node 4" in one
        assert "--rdzv-endpoint localhost:21000 --rdzv-id 41000-0" in one
        assert one.endswith(f"{interpreter} -m megatron_bpipe run pretrain_gpt.py --lr 1 e\n")
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
    """Although the others, ended with SIGTERM, would have the higher one."""
    environ = job(style, BPIPE_PYTHON=str(interpreter), FAILS="1", STATUS="37")
    status, output = run([str(SLURM / style), "x"], environ, 90)  # the others sleep
    assert status == 37, output
    if style == "srun.sbatch":  # the other's ranks are torchrun's
        said = "bpipe: task 1 on node1, rank 3, stage 3: ended with status 37"
        assert [line for line in output.splitlines() if "ended with" in line] == [said]


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({"SLURM_GPUS_PER_NODE": "2"}, 2),  # all 4 of the node are there: --exclusive
        ({"SLURM_GPUS_PER_NODE": "a100:2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:1"}, 3),
        ({}, 4),
        ({"SLURM_GPUS_PER_NODE": "2", "BPIPE_GPUS_PER_NODE": "1"}, 1),
    ],
)
def test_ranks_are_the_gpus_asked_for(
    interpreter: Path, variables: dict[str, str], gpus: int
) -> None:
    environ = job("torchrun.sbatch", BPIPE_PYTHON=str(interpreter), **variables)
    status, output = run([str(SLURM / "torchrun.sbatch"), "x"], environ, 30)
    assert status == 0, output
    assert output.count(f"--nproc-per-node {gpus} ") == 2


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
        ({"SLURM_GPUS_PER_NODE": "a100:2"}, "4 tasks but 2 GPUs on a node"),
    ],
)
def test_tasks_that_do_not_fill_the_nodes(changed: dict[str, str], message: str) -> None:
    status, output = run([str(SLURM / "srun.sbatch"), "x"], job("srun.sbatch", **changed), 30)
    assert status == 2
    assert message in output
