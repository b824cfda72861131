"""Both Slurm scripts, unmodified, on a real Slurm: training, a rank that fails, requeue.

Started by scripts/rehearse_slurm.sh. All of it runs in namespaces of its own (network, processes,
mounts, shared memory), so that nothing can be left behind and nothing is reached from outside. The
two nodes are two slurmd on this machine: they share its kernel, so the choice of a transport
between nodes is not what can be seen here (scripts/rehearse_hosts.sh is for that).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.rehearsals.cluster import Cluster, Job, processes
from scripts.rehearsals.common import (
    ROOT,
    TRAIN,
    Checks,
    dataset,
    losses,
    model,
    need,
    parsed,
    run_apart,
)

SCRIPTS = ROOT / "scripts" / "examples" / "slurm"
ITERATIONS = 8
# two of the four GPUs of a node, with --exclusive as the scripts have it
STYLES = {
    "torchrun.sbatch": ("--nodes=2", "--gpus-per-node=2"),
    "srun.sbatch": ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=a100:2"),
}


def main() -> int:
    """Outside: find out whether it can run, then run inside."""
    arguments = parsed(__doc__)
    if arguments.inside is not None:
        return inside(arguments.inside, arguments.report)
    slurm = dict.fromkeys(("slurmctld", "slurmd", "sbatch", "scontrol"), "slurm-wlm")
    need(slurm | {"munged": "munge", "unshare": "util-linux", "ip": "iproute2"})
    with tempfile.TemporaryDirectory(prefix="bpipe-slurm-") as folder:
        words = [sys.executable, "-m", "scripts.rehearsals.slurm", "--inside", folder]
        if arguments.report is not None:
            words += ["--report", str(arguments.report.resolve())]
        return run_apart(words)


def inside(folder: Path, report: Path | None) -> int:
    """In the namespaces: the cluster and its jobs."""
    (folder / "hosts").write_text("127.0.0.1 localhost control node1\n127.0.0.2 node2\n")
    for words in (
        *(["mount", "--make-rprivate", "/"], ["ip", "link", "set", "lo", "up"]),
        ["hostname", "control"],
        # a link besides loopback, or Slurm's getaddrinfo (AI_ADDRCONFIG) finds no address family
        ["ip", "link", "add", "lone", "type", "veth", "peer", "name", "end"],
        ["ip", "address", "add", "10.9.8.1/24", "dev", "lone"],
        ["ip", "link", "set", "lone", "up"],
        ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
        ["mount", "--bind", str(folder / "hosts"), "/etc/hosts"],
        ["mount", "--bind", "/dev/null", "/etc/resolv.conf"],
    ):
        subprocess.run(words, check=True)
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")  # what is killed leaves its files
    checks = Checks()
    data = dataset(folder)
    flags = [*model(ITERATIONS), *data]
    expected = reference(folder, flags)
    cluster = Cluster(folder)
    for style in STYLES:
        trains(cluster, checks, style, flags, expected)
    for style in STYLES:
        fails(cluster, checks, style, flags)
    is_killed(cluster, checks, flags)
    is_requeued(cluster, checks, flags, expected)
    is_refused(cluster, checks)
    return checks.write(report)


def reference(folder: Path, flags: list[str]) -> list[object]:
    """Losses of stock Megatron under torchrun, without Slurm and without BPipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--master-addr", "127.0.0.1", "-m", "megatron_bpipe", "run", str(TRAIN), *flags]
    command += ["--bpipe-report", str(folder / "stock")]
    with (folder / "stock.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference failed:\n{(folder / 'stock.log').read_text()[-6000:]}")
    return losses(folder / "stock")


def submit(cluster: Cluster, style: str, words: list[str], **more: str) -> int:
    """One of the two scripts, as it is."""
    return cluster.submit(*STYLES[style], str(SCRIPTS / style), *words, "--bpipe", **more)


def clean(cluster: Cluster, checks: Checks, job: Job) -> None:
    """Nothing of a job that is over may be left; Slurm gets a few seconds for its own."""
    left: dict[int, str] = {}

    def gone() -> bool:
        nonlocal left
        left = processes()
        return not left

    with contextlib.suppress(TimeoutError):
        cluster.wait(gone, 15, "processes to end")
    shared = os.listdir("/dev/shm")
    checks.add(
        f"job {job.number} leaves nothing", not left and not shared, f"{left or 'no'} processes, "
        f"{shared or 'no'} shared memory",
    )  # fmt: skip


def trains(
    cluster: Cluster, checks: Checks, style: str, flags: list[str], expected: list[object]
) -> None:
    """PP 4 on two nodes: the losses of torchrun, pairs on one node."""
    report = cluster.folder / style
    job = cluster.finished(
        submit(cluster, style, [str(TRAIN), *flags, "--bpipe-report", str(report)])
    )
    checks.add(f"{style}: state", job.state == "COMPLETED", job.state, job.said)
    if job.state == "COMPLETED":
        equal = losses(report) == expected
        checks.add(f"{style}: losses", equal, f"bitwise those of torchrun: {equal}", job.said)
    moved = re.search(r"pairs \(evictor, acceptor\) +2 of 2 +0 of 2", job.said) is not None
    checks.add(f"{style}: pairs across nodes", moved, "2 of 2, placed 0 of 2" if moved else "?")
    clean(cluster, checks, job)


def fails(cluster: Cluster, checks: Checks, style: str, flags: list[str]) -> None:
    """A rank ends with 37 in the third iteration: who, and the job's status."""
    script = str(ROOT / "scripts" / "rehearsals" / "failing.py")
    job = cluster.finished(submit(cluster, style, [script, *flags], FAILS="1:3:37"))
    kept = 1 if style == "torchrun.sbatch" else 37  # torchrun's own status is 1
    checks.add(f"{style}: status after exit 37", job.status == kept, job.status, job.said)
    said(
        checks,
        f"{style}: who failed",
        job,
        "task 1 on node1, rank 3, stage 3: ended with status 37",
    )
    clean(cluster, checks, job)


def said(checks: Checks, name: str, job: Job, wanted: str) -> None:
    """The first line that names a rank that ended badly must be ``wanted``."""
    lines = [line for line in job.said.splitlines() if ": ended with status" in line]
    first = lines[0].partition("bpipe: ")[2] if lines else "nothing"
    checks.add(name, first == wanted, first, job.said)


def is_killed(cluster: Cluster, checks: Checks, flags: list[str]) -> None:
    """Somebody kills a rank with SIGKILL: the job ends at once."""
    number = submit(cluster, "srun.sbatch", [str(TRAIN), *flags])
    cluster.wait(lambda: iteration(cluster.job(number)) >= 2, 300, "two iterations")
    os.kill(rank_process(2), signal.SIGKILL)
    start = time.monotonic()
    job = cluster.finished(number, 60)
    took = time.monotonic() - start
    checks.add("SIGKILL: status", job.status == 137, job.status, job.said)
    checks.add("SIGKILL: seconds to the job's end", took < 20, f"{took:.1f}")
    said(
        checks,
        "SIGKILL: who failed",
        job,
        "task 2 on node2, rank 1, stage 1: ended with status 137",
    )
    clean(cluster, checks, job)


def iteration(job: Job) -> int:
    """The last one in its log."""
    found = re.findall(r"iteration +(\d+)/", job.said)
    return int(found[-1]) if found else 0


def rank_process(task: int) -> int:
    """The training process of a Slurm task."""
    wanted = f"SLURM_PROCID={task}".encode()
    for pid, name in processes().items():
        entry = Path("/proc", str(pid))
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if name.startswith("python") and wanted in variables and not _forked(entry):
                return pid
        except OSError:
            continue
    raise RuntimeError(f"task {task} has no process: {processes()}")


def _forked(entry: Path) -> bool:
    """Whether its parent is Python too: a worker of its data loader."""
    parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
    return Path("/proc", parent, "comm").read_text().startswith("python")


def is_requeued(cluster: Cluster, checks: Checks, flags: list[str], expected: list[object]) -> None:
    """``scontrol requeue`` in mid-training: it goes on from its last checkpoint."""
    saved, report = str(cluster.folder / "checkpoints"), cluster.folder / "requeued"
    words = [str(TRAIN), *flags, "--save", saved, "--load", saved, "--save-interval", "2"]
    number = submit(cluster, "srun.sbatch", [*words, "--bpipe-report", str(report)])
    cluster.wait(lambda: iteration(cluster.job(number)) >= 3, 300, "three iterations")
    cluster.requeue(number)
    job = cluster.finished(number)
    checks.add(
        "requeue: state", (job.state, job.restarts) == ("COMPLETED", 1),
        f"{job.state} after {job.restarts} restart(s)", job.said,
    )  # fmt: skip
    first = re.findall(r"successfully loaded checkpoint .* at iteration +(\d+)", job.said)
    begun = int(first[-1]) if first else 0
    checks.add("requeue: resumed after iteration", begun in (2, 4, 6), begun, job.said)
    if job.state == "COMPLETED":
        equal = losses(report) == expected[begun:]
        checks.add("requeue: losses", equal, f"bitwise the rest of torchrun's: {equal}")
    kept = job.said.count("1F1B with activations balanced")
    checks.add("requeue: both starts in one log", kept == 2, kept)
    clean(cluster, checks, job)


def is_refused(cluster: Cluster, checks: Checks) -> None:
    """Two tasks but four GPUs a node: one line, with what was given."""
    words = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=4")
    job = cluster.finished(cluster.submit(*words, str(SCRIPTS / "srun.sbatch"), "x"), 60)
    right = job.status == 2 and "2 tasks but 4 GPUs on a node" in job.said
    checks.add("2 tasks and 4 GPUs a node", right, job.said.strip(), job.said)


if __name__ == "__main__":
    sys.exit(main())
