#!/usr/bin/env python3
"""Bandwidth of BPipe's copies against the same-device copy of that size in one process.

    python benchmarks/copies.py [--acceptor-gpu 1] [--output copies.json]

The evictor is this process, the acceptor another one, on the same GPU or on the one named; a
micro-batch is 40 storages, as a few layers have. The aim: at least 80 % of the plain copy between
the same two GPUs from 64 MiB up. Exit status 77: no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.environment import NO_GPU, environment  # noqa: E402
from megatron_bpipe.runtime.block import ALIGNMENT  # noqa: E402
from megatron_bpipe.runtime.transport import TransferHandle, Transport  # noqa: E402
from megatron_bpipe.runtime.transport.host.own import host_transport  # noqa: E402
from megatron_bpipe.runtime.transport.pair.handshake import BorrowedPool, PairEnd  # noqa: E402

MIB, GIB = 2**20, 2**30
SIZES = [n * MIB for n in (1, 4, 16, 64, 256, 1024)]
PIECES = 40
REPEATS = 9
SLEEP_CYCLES = 20_000_000  # about 10 ms


def main() -> int:
    """Measure every size over every transport."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acceptor-gpu", type=int, default=0, help="where the pool lies")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return NO_GPU
    device, there = (torch.device("cuda", gpu) for gpu in (0, arguments.acceptor_gpu))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        end, acceptor = _pair(Path(folder), arguments.acceptor_gpu)
        pool = BorrowedPool(end, 1)
        pool.request(SIZES[-1] + 512 * PIECES)
        pair, transport = pool.open()
        transports = {
            pair.transport: transport,
            "host": host_transport("0-1", SIZES[-1] + 512 * PIECES, device, 60.0),
        }
        for size in SIZES:
            row: dict[str, Any] = {"bytes": size, "plain_copy_gib_s": _plain(size, device, there)}
            for name, transport in transports.items():
                out, back = _through(transport, size, device)
                row[f"{name}_out_gib_s"], row[f"{name}_back_gib_s"] = out, back
            row["ratio"] = row[f"{pair.transport}_out_gib_s"] / row["plain_copy_gib_s"]
            rows.append(row)
        for transport in transports.values():
            transport.close()
        end.store.set("done", "")
        acceptor.wait(60)
    reached = all(row["ratio"] >= 0.8 for row in rows if row["bytes"] >= 64 * MIB)
    result = {
        "environment": environment(),
        "transport": f"{pair.transport} ({pair.why})",
        "pieces": PIECES,
        "at_least_80_percent_from_64_mib": reached,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


def _pair(folder: Path, gpu: int) -> tuple[PairEnd, subprocess.Popen[bytes]]:
    from tests.gpu.acceptor import end_of

    store = str(folder / "store")
    environment_ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.gpu.acceptor", store, str(gpu)]
    acceptor = subprocess.Popen(command, cwd=ROOT, env=environment_)
    return end_of(store, "evictor"), acceptor


def _through(transport: Transport, size: int, device: torch.device) -> tuple[float, float]:
    each = size // PIECES // ALIGNMENT * ALIGNMENT  # as real storages are
    pieces = [torch.ones(each, dtype=torch.uint8, device=device) for _ in range(PIECES)]
    out, back = [], []
    for _ in range(REPEATS):
        out.append(_seconds(lambda: transport.evict(0, pieces)))
        back.append(_seconds(lambda: transport.load(0, pieces)))
        transport.release(0)
    return _gib_s(each * PIECES, out), _gib_s(each * PIECES, back)


def _seconds(start_copy: Callable[[], TransferHandle]) -> float:
    # the computing stream, which the copies wait for, is busy while they are queued one by one: it
    # is the link that is measured here
    torch.cuda._sleep(SLEEP_CYCLES)
    transfer = start_copy()
    transfer.wait()
    start, end = transfer.span
    return end - start


def _plain(size: int, device: torch.device, there: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source, device=there)
    return _gib_s(size, [_timed(lambda: target.copy_(source)) for _ in range(REPEATS)])


def _timed(action: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _gib_s(size: int, seconds: list[float]) -> float:
    return size / statistics.median(seconds[1:]) / GIB


if __name__ == "__main__":
    sys.exit(main())
