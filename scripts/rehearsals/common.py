"""What the rehearsals share: a tiny GPT, the programs they need, and a list of what was seen."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_bpipe.integration.cpu.flags import cpu_flags

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "examples" / "pretrain_gpt.py"
CANNOT_RUN = 77  # what automake's tests say when they cannot run here
STAGES = 4
TIME_OUT = 60  # seconds after which a collective that is not over fails


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    seen: str


@dataclass
class Checks:
    """What a rehearsal has seen, printed as it goes."""

    found: list[Check] = field(default_factory=list)

    def add(self, name: str, passed: bool, seen: object, log: str = "") -> None:
        """Note one; where it failed the end of ``log`` is printed too."""
        self.found.append(Check(name, bool(passed), str(seen)))
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {seen}", flush=True)
        if not passed and log:
            print("\n".join(f"       | {line}" for line in log.splitlines()[-40:]), flush=True)

    def write(self, path: Path | None) -> int:
        """Write them as JSON, if asked; the exit status."""
        if path is not None:
            path.write_text(json.dumps([asdict(check) for check in self.found], indent=1))
        failed = sum(not check.passed for check in self.found)
        print(f"{len(self.found) - failed} as it should be, {failed} not", flush=True)
        return 0 if self.found and not failed else 1


def parsed(doc: str | None) -> argparse.Namespace:
    """Arguments of a rehearsal that starts itself again, apart from the rest of the machine."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was seen as JSON")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def cannot_run(why: str) -> SystemExit:
    """What ends a rehearsal that this machine does not allow."""
    print(f"cannot run here: {why}", file=sys.stderr)
    return SystemExit(CANNOT_RUN)


def need(programs: dict[str, str]) -> None:
    """Install what is missing of ``programs``, name -> Debian's package, where that may be done.

    Raises:
        SystemExit: it may not, or the namespaces that keep a rehearsal apart may not be made.
    """
    if os.geteuid() != 0:
        raise cannot_run("namespaces and network links of its own need root")
    missing = sorted({package for name, package in programs.items() if not _program(name)})
    if missing:
        if shutil.which("apt-get") is None:
            raise cannot_run(f"{', '.join(missing)} are not installed, and there is no apt-get")
        print(f"installing {' '.join(missing)}", flush=True)
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            done = subprocess.run(
                ["apt-get", "-q", *words], env=environment, check=False, text=True, **quiet
            )
            if done.returncode:
                last = (done.stderr.strip() or "no reason given").splitlines()[-1]
                raise cannot_run(f"apt-get {words[0]} failed: {last}")
    tried = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise cannot_run(f"no namespaces: {tried.stderr.strip()}")


APART = (
    *("unshare", "--net", "--uts", "--ipc", "--mount", "--pid"),
    *("--fork", "--kill-child", "--mount-proc"),
)
"""In front of a command: nothing it starts or opens outlives it or is reached from outside."""


def run_apart(words: list[str], namespaces: tuple[str, ...] = APART[1:]) -> int:
    """Run ``words`` in namespaces of their own; whatever ends this process ends them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = subprocess.Popen(["unshare", *namespaces, *words], cwd=ROOT, env=environment())
    try:
        return process.wait()
    finally:
        process.kill()  # the first process in there goes with it, and with that one all others
        process.wait()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def dataset(folder: Path) -> list[str]:
    """Write some text as a dataset; Megatron's flags for it."""
    sys.path.insert(0, str(ROOT))
    from scripts.examples.prepare_data import write_dataset

    data = write_dataset(folder / "text", max_bytes=256 * 2**10)
    return [*data.flags(), "--data-cache-path", str(folder / "cache")]


def model(iterations: int, microbatches: int = 8, size: int = 64) -> list[str]:
    """A GPT of one layer a stage, as Megatron's flags."""
    sizes = {
        "--pipeline-model-parallel-size": STAGES,
        "--num-layers": STAGES,
        "--hidden-size": size,
        "--num-attention-heads": 4,
        "--seq-length": size,
        "--max-position-embeddings": size,
        "--micro-batch-size": 2,
        "--global-batch-size": 2 * microbatches,
        "--train-iters": iterations,
        "--lr": "1e-3",
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--split": "100,0,0",
        "--eval-iters": 0,
        "--eval-interval": 1000,
        "--log-interval": 1,
        "--seed": 1234,
        "--distributed-timeout-minutes": TIME_OUT // 60,
    }
    return [str(word) for pair in sizes.items() for word in pair] + cpu_flags()


def losses(report: Path) -> list[Any]:
    """The bits of every iteration's losses, from ``--bpipe-report``."""
    found: list[Any] = json.loads((report / "memory.json").read_text())["losses"]
    return found


def environment() -> dict[str, str]:
    """What every process of a rehearsal gets."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "BPIPE"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "BPIPE_PYTHON": sys.executable,
    }
