"""Runs of the real Megatron training loop for tests: forked ranks, time-outs, shared results."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.examples.forked_ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "examples" / "pretrain_gpt.py"
IMPORT_SECONDS = 300  # a cold disk needs minutes


@dataclass(frozen=True)
class Result:
    """One finished run."""

    out: Path
    status: dict[int, int | None]

    @property
    def ok(self) -> bool:
        """Whether every rank ended with status 0."""
        return set(self.status.values()) == {0}

    def log(self, rank: int) -> str:
        """What ``rank`` printed."""
        return (self.out / f"rank{rank}.log").read_text(errors="replace")

    @property
    def placed(self) -> dict[int, int]:
        """Physical rank (the harness's) of each logical one (Megatron's)."""
        files = self.out.glob("placed*")
        return dict(sorted(json.loads(path.read_text()) for path in files))

    @property
    def logs(self) -> str:
        """The end of every rank's output, for messages."""
        return "\n".join(f"--- rank {r}\n{self.log(r)[-3000:]}" for r in sorted(self.status))

    @cached_property
    def states(self) -> list[dict[str, Any]]:
        """Each rank's dump: losses, grads, params."""
        import torch

        return [torch.load(self.out / f"state{r}.pt") for r in sorted(self.status)]

    @cached_property
    def memory(self) -> dict[str, Any]:
        """The run's memory.json."""
        return json.loads((self.out / "report" / "memory.json").read_text())

    def timeline(self, stage: int) -> dict[str, Any]:
        """The timeline of the first rank of ``stage``."""
        path = min((self.out / "report").glob(f"timeline-stage{stage:03d}-*.json"))
        return json.loads(path.read_text())


@dataclass
class Megatron:
    """Starts runs; equal requests share one result.

    Attributes:
        folder: for everything that runs write; processes with the same one share results.
        data: Megatron's flags for the dataset.
        megatron: folder whose ``megatron`` is used instead of the installed one.
        also: folders with what that one needs and this environment lacks.
        core_only: do not import the training loop; only `script` can be used.
        training_script: what `train` runs.
        steps: of a training that asks for no other number.
    """

    folder: Path
    data: list[str]
    megatron: Path | None = None
    also: tuple[Path, ...] = ()
    core_only: bool = False
    training_script: Path = SCRIPT
    steps: int = 10
    _fork_server: subprocess.Popen[str] | None = None
    _results: dict[str, Result] = field(default_factory=dict)

    def train(
        self,
        flags: list[str],
        *,
        world: int = 4,
        steps: int | None = None,
        hooks: list[dict[str, Any]] | None = None,
        timeout: float = 240,
        env: dict[str, str] | None = None,
        fresh: bool = False,
        dump_at: int | None = None,
        nodes: int = 1,
        report: bool = True,
    ) -> Result:
        """Train up to step ``steps`` on ``world`` forked ranks; ``flags`` come with the data's.

        Every rank dumps its state after the ``dump_at``-th step of this run, by default the last.
        With ``nodes`` the ranks' environment says that they run on so many. Without ``report``
        there is no memory.json, and nothing that slows a step down.
        """
        steps = steps or self.steps
        request = {"world": world, "argv": flags, "hooks": hooks or [], "env": env or {}}
        request["nodes"] = nodes
        job = request | {"script": str(self.training_script)}
        job["dump_at"] = steps if dump_at is None else dump_at

        def run() -> Result:
            out = self._new_folder()
            argv = [*flags, *self.data, "--train-iters", str(steps)]
            argv += ["--bpipe-report", str(out / "report")] if report else []
            return self._run(job | {"argv": argv}, out, timeout)

        # a test's own folder may have had the same name in an earlier test
        if fresh or not {"--save", "--load"}.isdisjoint(flags):
            return run()
        key = json.dumps(job | {"steps": steps, "report": report})
        if key not in self._results:
            self._results[key] = self._once(key, run)
        return self._results[key]

    def script(
        self,
        name: str,
        argv: list[str],
        *,
        world: int,
        timeout: float = 120,
        env: dict[str, str] | None = None,
    ) -> Result:
        """Run ``tests/harness/scripts/NAME`` on ``world`` forked ranks, Megatron imported."""
        path = Path(__file__).parent / "scripts" / name
        job = {"world": world, "script": str(path), "argv": argv, "hooks": [], "env": env or {}}
        return self._run(job | {"dump_at": None}, self._new_folder(), timeout)

    def _once(self, key: str, run: Callable[[], Result]) -> Result:
        """What ``run`` gives: of all processes that ask for ``key`` one runs, the others wait."""
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        kept = self.folder / f"{name}.json"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                result = run()
                kept.write_text(json.dumps([str(result.out), list(result.status.items())]))
                return result
        out, status = json.loads(kept.read_text())
        return Result(Path(out), dict(status))

    def _new_folder(self) -> Path:
        for number in itertools.count(len(list(self.folder.glob("run*")))):
            out = self.folder / f"run{number:03d}"
            with contextlib.suppress(FileExistsError):  # another process has just made it
                out.mkdir()
                return out
        raise AssertionError

    def _run(self, job: dict[str, Any], out: Path, timeout: float) -> Result:
        job = job | {"out": str(out), "timeout": timeout, "port": free_port()}
        answer = self._ask(job, timeout + 60)
        return Result(out, {int(rank): code for rank, code in answer["status"].items()})

    def close(self) -> None:
        """End the fork server and, through it, whatever it forked."""
        if self._fork_server is not None:
            assert self._fork_server.stdin is not None
            self._fork_server.stdin.close()
            try:
                self._fork_server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._fork_server.pid, signal.SIGKILL)
                self._fork_server.wait()
            self._fork_server = None

    @property
    def _fork_server_log(self) -> Path:
        return self.folder / f"fork_server-{os.getpid()}.log"

    def _ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        if self._fork_server is None:
            self._start()
        assert self._fork_server is not None
        assert self._fork_server.stdin is not None
        self._fork_server.stdin.write(json.dumps(job) + "\n")
        self._fork_server.stdin.flush()
        return self._answer(timeout)

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.harness.fork_server"]
        command += ["--core-only"] * self.core_only
        if self.megatron is not None:
            command += [str(folder) for folder in (self.megatron, *self.also)]
            # some releases compile CUDA code when imported, even without a device
            environment["TORCH_CUDA_ARCH_LIST"] = "8.0"
            environment["CUDA_HOME"] = "/nonexistent"
            environment["TORCH_EXTENSIONS_DIR"] = str(self.folder / "extensions")
        environment["TMPDIR"] = str(self.folder)  # it leaves without cleaning up, too
        log = self._fork_server_log.open("w")
        self._fork_server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,
        )
        log.close()
        self._answer(IMPORT_SECONDS)

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._fork_server is not None
        assert self._fork_server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._fork_server.stdout, selectors.EVENT_READ)
            deadline = time.monotonic() + timeout
            if not selector.select(deadline - time.monotonic()):
                os.killpg(self._fork_server.pid, signal.SIGKILL)
                self._fork_server.wait()
                self._fork_server = None
                raise TimeoutError(f"no answer from the test ranks within {timeout} s")
        line = self._fork_server.stdout.readline()
        if not line:
            log = self._fork_server_log.read_text()[-3000:]
            self._fork_server = None
            raise RuntimeError(f"the process that forks test ranks died:\n{log}")
        answer: dict[str, Any] = json.loads(line)
        return answer
