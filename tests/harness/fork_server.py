"""Import Megatron once, then fork the ranks of every run from here.

Importing ``megatron.training`` takes 10 s alone and 48 s in eight processes at once on two cores;
a fork takes milliseconds, and is spared what every rank would do before its first step. Nothing
here starts a thread or a process group before the fork.

Protocol: one JSON job a line on stdin, one JSON answer a line on stdout.

    python -m tests.harness.fork_server [--core-only] [FOLDER_WITH_ANOTHER_MEGATRON [MORE]]
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from scripts.examples import forked_ranks

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve jobs until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Megatron prints while importing must not mix with answers
    from megatron_bpipe.integration import cpu

    cpu.install()
    core_only = "--core-only" in sys.argv
    folders = [word for word in sys.argv[1:] if word != "--core-only"]
    if folders:
        use_megatron_of(Path(folders[0]))
        sys.path += folders[1:]
    if core_only:
        import megatron.core.datasets.gpt_dataset
        import megatron.core.models.gpt  # noqa: F401
    else:
        forked_ranks.import_megatron()

    gc.collect()
    gc.freeze()  # a collection in a rank would touch, and so copy, all that it shares
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_serve(json.loads(line))) + "\n")
        answers.flush()
    os._exit(0)  # nothing is left to do but to take all of torch down


def use_megatron_of(folder: Path) -> None:
    """Take all of ``megatron`` from ``folder``: a namespace package would mix two releases."""
    sys.path.insert(0, str(folder))
    importlib.import_module("megatron").__path__ = [str(folder / "megatron")]
    core = importlib.import_module("megatron.core")
    assert Path(str(core.__file__)).is_relative_to(folder), core.__file__


def _serve(job: dict[str, Any]) -> dict[str, Any]:
    ranks = {}
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            _run_rank(job, rank)
        ranks[pid] = rank
    Path(job["out"], "pids").write_text(json.dumps({str(rank): pid for pid, rank in ranks.items()}))
    status: dict[str, int | None] = {}
    deadline = time.monotonic() + job["timeout"]
    while ranks and time.monotonic() < deadline and not all(map(_stopped, ranks)):
        for pid in list(ranks):
            done, raw = os.waitpid(pid, os.WNOHANG)
            if done:
                status[str(ranks.pop(pid))] = os.waitstatus_to_exitcode(raw)
        time.sleep(0.02)
    for pid, rank in ranks.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        status[str(rank)] = None
    return {"status": status}


def _stopped(pid: int) -> bool:
    """Whether a process has been stopped by a signal: it would never end."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def _run_rank(job: dict[str, Any], rank: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(Path(job["out"], f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    per_node = job["world"] // job.get("nodes", 1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % per_node),
        GROUP_RANK=str(rank // per_node),
        WORLD_SIZE=str(job["world"]),
        LOCAL_WORLD_SIZE=str(per_node),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job["port"]),
        TMPDIR=job["out"],  # a rank leaves without cleaning up, as one that is killed does
        **job["env"],
    )
    tempfile.tempdir = job["out"]
    code = 1
    try:
        from tests.harness import rank as rank_side

        rank_side.run(job)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises where a data loader's ends
        for child in multiprocessing.active_children():  # Megatron's writers of checkpoints
            child.kill()
        os._exit(code)


if __name__ == "__main__":
    main()
