#!/usr/bin/env python3
"""The first questions on a GPU: whether CUDA IPC opens, whether copies run beside products.

    python benchmarks/gpu_probe.py [--output probe.json]

Two processes on GPU 0. Each answer stands on its own: one that fails says why, the others go on.
The overlap is measured with CUDA_DEVICE_MAX_CONNECTIONS=1, as Megatron demands, with queues of
their own for copies beside it, and with neither; for large copies and for 200 of 5 MiB, which is
what a micro-batch looks like. Exit status 77: no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.environment import NO_GPU, environment  # noqa: E402

MIB, GIB = 2**20, 2**30
POOL = 256 * MIB
COPY = GIB
SIDE = 8192  # of the matrices
PRODUCTS = 20
REPEATS = 7
SMALL, SMALL_COPIES = 5 * MIB, 200
QUEUES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "CUDA_DEVICE_MAX_COPY_CONNECTIONS": "8",
}
VARIANTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS=1": ("CUDA_DEVICE_MAX_CONNECTIONS",),
    "both variables": tuple(QUEUES),
    "neither variable": (),
}


def main() -> int:
    """Ask all questions, or be the other process of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--open", metavar="HANDLE", help=argparse.SUPPRESS)
    parser.add_argument("--overlap", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return NO_GPU
    if arguments.open:
        print(json.dumps(_open(arguments.open)))
        return 0
    if arguments.overlap:
        print(json.dumps(_overlap()))
        return 0
    result = {
        "environment": environment(),
        "ipc": _ask(_ipc),
    }
    for name, variables in VARIANTS.items():
        ask = functools.partial(_child, "--overlap", variables=variables)
        result[f"overlap, {name}"] = _ask(ask)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0 if all("error" not in result[name] for name in list(result)[1:]) else 1


def _ask(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return question()
    except Exception as error:  # the answer is why it cannot be had
        return {"error": f"{type(error).__name__}: {error}"}


def _child(*words: str, variables: Collection[str]) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in QUEUES}
    environment |= {name: QUEUES[name] for name in variables}
    command = [sys.executable, __file__, *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else "no message")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _ipc() -> dict[str, Any]:
    """Lend memory to another process; it writes there, this one reads."""
    from megatron_bpipe.runtime.transport.cuda import driver
    from megatron_bpipe.runtime.transport.cuda.ipc import allocate, tensor_at

    device = torch.device("cuda", 0)
    address = allocate(POOL, device, "probe")
    pool = tensor_at(address, POOL, device)
    pool.zero_()
    torch.cuda.synchronize()
    answer = _child("--open", driver.share(address).hex(), variables=())
    torch.cuda.synchronize()
    answer["written_there_read_here"] = bool((pool == 7).all())
    driver.free(address)
    return answer


def _open(handle: str) -> dict[str, Any]:
    from megatron_bpipe.runtime.transport.copies import Part
    from megatron_bpipe.runtime.transport.cuda import driver
    from megatron_bpipe.runtime.transport.cuda.ipc import tensor_at
    from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies

    device = torch.device("cuda", 0)
    mine, other = (torch.full((POOL,), 7, dtype=torch.uint8, device=device) for _ in range(2))
    before, _ = torch.cuda.mem_get_info()
    address = driver.open_shared(bytes.fromhex(handle))
    after, _ = torch.cuda.mem_get_info()
    pool = tensor_at(address, POOL, device)
    copies = StreamCopies(device)
    gib_s = {}
    for name, target, source in (
        ("out", pool, mine),
        ("back", mine, pool),
        ("within_one_process", other, mine),
    ):
        seconds = []
        for _ in range(REPEATS):
            transfer = copies.start(name, [Part(target, 0, source, 0, POOL)], out=True)
            transfer.wait()
            start, end = transfer.span
            seconds.append(end - start)
        gib_s[name] = POOL / statistics.median(seconds[1:]) / GIB
    copies.close()
    driver.close_shared(address)
    return {"opens": True, "bytes": POOL, "gib_s": gib_s, "mapping_costs_bytes": before - after}


def _overlap() -> dict[str, Any]:
    """Copies alone, products alone, both at once."""
    from megatron_bpipe.runtime.transport.cuda import driver
    from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies
    from megatron_bpipe.runtime.transport.host.own import HostMemory

    device = torch.device("cuda", 0)
    copies = StreamCopies(device)
    a = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    source = torch.ones(COPY, dtype=torch.uint8, device=device)
    near = torch.empty_like(source)
    host = HostMemory("probe", COPY, device)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, a)

    def in_one_call(part: list[driver.Copy]) -> None:
        if not driver.copy_all(part, copies.stream.cuda_stream):
            raise RuntimeError("the driver takes no batch of these copies")

    def one_by_one(part: list[driver.Copy]) -> None:
        driver.copy_each(part, copies.stream.cuda_stream)

    alone = _median(products)
    rows: dict[str, Any] = {
        "product": f"{PRODUCTS} of {SIDE}^3, bf16",
        "products_alone_s": alone,
        "copies_in_one_call": driver.copies_in_one_call(),
    }
    pair = SMALL * SMALL_COPIES, SMALL_COPIES
    for name, target in (("same_device", near), ("pinned_host", host.map())):
        for size, count, queue in (
            (COPY, 1, one_by_one),
            (*pair, one_by_one),
            (*pair, in_one_call),
        ):
            there, here, each = target.data_ptr(), source.data_ptr(), size // count
            batch = [(there + i * each, here + i * each, each) for i in range(count)]
            label = f"{name}, {count} of {each // MIB} MiB, {queue.__name__}"
            rows[label] = _ask(
                lambda batch=batch, queue=queue: _beside(copies, batch, queue, products, alone)
            )
    host.close()
    return rows


def _beside(
    copies: Any,
    batch: list[tuple[int, int, int]],
    queue: Callable[[list[tuple[int, int, int]]], None],
    products: Callable[[], None],
    alone: float,
) -> dict[str, Any]:
    """As many batches as take about as long as the products: what hides can be told from noise."""

    def copy(times: int) -> Any:
        start = copies.begin()
        for _ in range(times):
            queue(batch)
        return copies.end(start, [])

    once = _median(lambda: copy(1).wait())
    times = max(1, round(alone / once))

    def both() -> None:
        transfer = copy(times)
        products()
        transfer.wait()

    torch.cuda.synchronize()
    begun = time.perf_counter()
    queue(batch)
    host = time.perf_counter() - begun
    copies_alone, together = _median(lambda: copy(times).wait()), _median(both)
    size = sum(size for _, _, size in batch)
    return {
        "batches": times,
        "host_s_a_batch": host,
        "copies_alone_s": copies_alone,
        "gib_s": times * size / copies_alone / GIB,
        "together_s": together,
        # 1: all of the shorter one hid behind the longer one; 0: one after the other
        "hidden": (copies_alone + alone - together) / min(copies_alone, alone),
    }


def _median(action: Callable[[], None]) -> float:
    """Seconds of device time; the first warms up."""
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
