"""One run under torchrun, with a time limit that leaves no rank behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS_TO_END = 45.0  # torchrun itself gives its ranks 30
QUIET = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # as Megatron demands
    # Megatron warms its fused functions up at start; four compilers at once take a minute
    "TORCH_COMPILE_DISABLE": "1",
}


def torchrun(
    words: Sequence[str], ranks: int, seconds: float, log: Path, variables: dict[str, str]
) -> int | None:
    """Run ``words`` (a script or ``-m module``, and arguments) in ``ranks`` processes.

    Args:
        words: what torchrun gets after its own options.
        ranks: processes on this machine.
        seconds: most that it may take.
        log: file that gets all output.
        variables: of the environment, beside `QUIET`.

    Returns:
        The exit status; None if it was not over in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", f"{log}.torchrun", *words]  # it would leave a folder in /tmp
    paths = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | QUIET | paths | variables,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # who is told to end must end the run too
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let torchrun end its ranks: they are in sessions of their own, nobody else knows them."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
