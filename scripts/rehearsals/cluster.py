"""A real Slurm of two virtual nodes with four GPUs each (null devices), on a host named control."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NODES = ("node1", "node2")
GPUS = 4
DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """\
ClusterName=bpipe
SlurmctldHost=control(127.0.0.1)
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
GresTypes=gpu
ReturnToService=2
KillWait=5
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=control NodeAddr=127.0.0.1 Port=17001 CPUs=8 Gres=gpu:a100:4
NodeName=node2 NodeHostname=control NodeAddr=127.0.0.2 Port=17002 CPUs=8 Gres=gpu:a100:4
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=30 State=UP
"""


@dataclass(frozen=True)
class Job:
    """A job as ``scontrol`` shows it."""

    number: int
    state: str
    status: int
    signal: int
    restarts: int
    log: Path

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Cluster:
    """Its controller, its nodes, and their jobs."""

    def __init__(self, folder: Path) -> None:
        """Write its files below ``folder`` and start it."""
        self.folder = folder
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (folder / "gres.conf").write_text(
            f"NodeName=node[1-2] Name=gpu Type=a100 File={folder}/gpu[0-{GPUS - 1}]\n"
        )
        for gpu in range(GPUS):  # a character device, or Slurm calls the node invalid
            os.mknod(folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        words = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "m.pid"}
        words |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        self._daemon("munged", "--force", *(f"--{name}={path}" for name, path in words.items()))
        self._daemon("slurmctld", "-f", os.environ["SLURM_CONF"])
        for node in NODES:
            start = f'hostname {node}; exec slurmd -f "$SLURM_CONF" -N {node}'
            self._daemon("unshare", "--mount", "--uts", "sh", "-c", start)
        self.wait(lambda: self._ask("sinfo", "-h", "-o", "%D %T") == "2 idle", 60, "idle nodes")

    def submit(self, *words: str, **more: str) -> int:
        """``sbatch``; the job's number."""
        log = self.folder / "job-%j.log"
        environment = os.environ | more
        done = subprocess.run(
            ["sbatch", "--parsable", "--output", str(log), *words],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(words)}: {done.stderr}")
        return int(done.stdout)

    def job(self, number: int) -> Job:
        """How it stands."""
        fields: dict[str, str] = {}
        deadline = time.monotonic() + 60  # a busy controller does not answer every time
        while "ExitCode" not in fields and time.monotonic() < deadline:
            shown = self._ask("scontrol", "show", "job", str(number))
            fields = dict(re.findall(r"(\w+)=(\S*)", shown))
        status, signal = map(int, fields["ExitCode"].split(":"))
        log = self.folder / f"job-{number}.log"
        return Job(number, fields["JobState"], status, signal, int(fields["Restarts"]), log)

    def finished(self, number: int, seconds: float = 600) -> Job:
        """The job, when it is over."""
        self.wait(lambda: self.job(number).state in ENDED, seconds, f"the end of job {number}")
        return self.job(number)

    def requeue(self, number: int) -> None:
        """Requeue it, and let it start without the two minutes that Slurm adds."""
        self._ask("scontrol", "requeue", str(number))
        self.wait(lambda: self.job(number).state == "PENDING", 60, "the requeued job")
        self._ask("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Look ten times a second."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The end of what the daemons have logged."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def _ask(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip()

    def _daemon(self, *words: str) -> None:
        # no pipes: a daemon would hold them open
        with (self.folder / "daemons.log").open("a") as log:
            subprocess.run(words, stdout=log, stderr=log, timeout=60, check=True)


def processes() -> dict[int, str]:
    """Name of every process that can be seen from here but the daemons and this one's parents."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (1, os.getpid()):
            continue
        try:
            name = (entry / "comm").read_text().strip()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if name not in DAEMONS and state != "Z":  # over, and nobody here to wait for it
            found[int(entry.name)] = name
    return found
