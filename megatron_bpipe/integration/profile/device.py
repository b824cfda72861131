"""The device: its name, its peak, its memory, and a limit on that.

Units: FLOP/s, bytes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_bpipe.estimate.hardware import recognised
from megatron_bpipe.estimate.profile import Device
from megatron_bpipe.runtime.transport.host.limits import available_bytes, limit_bytes

GIB = 2**30


def describe(dtype: torch.dtype, peak: float | None, memory_limit: int | None) -> Device:
    """The device at hand.

    Args:
        dtype: of the matrix multiplications whose peak is wanted.
        peak: what the user says it is.
        memory_limit: as large as the user wants it treated.
    """
    name = device_name()
    if peak is not None:
        source = "given with --peak-tflops"
    else:
        peak, source = _peak(name, dtype)
    memory = total_bytes() if memory_limit is None else min(memory_limit, total_bytes())
    return Device(name=name, peak_flops=peak, peak_source=source, memory_bytes=memory)


def device_name() -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))
        model = found[1].strip() if found else model
    return f"{model} ({torch.get_num_threads()} thread(s))"


def total_bytes() -> int:
    """Memory of the GPU, or of this machine or container."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = limit_bytes()
    return physical if allowed is None else min(physical, allowed)


@contextmanager
def memory_limited(limit: int | None) -> Iterator[None]:
    """Let an allocation past ``limit`` bytes from now on fail, inside the block.

    On a GPU that is torch's allocator. On the CPU it is the kernel's limit on this process's
    data, which counts what is allocated, touched or not; and it is set without a limit too, to
    what is free: the kernel would rather kill a process than refuse it pages.
    """
    if torch.cuda.is_available():
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total_bytes()))
        try:
            yield
        finally:
            if limit is not None:
                torch.cuda.set_per_process_memory_fraction(1.0)
        return
    free = available_bytes()
    most = min(size for size in (limit, free, total_bytes()) if size is not None)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = _data_bytes()
    if used is not None:
        wanted = used + most
        if before[1] != resource.RLIM_INFINITY:
            wanted = min(wanted, before[1])
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def empty_caches() -> None:
    """Return what is free to the device, so that one measurement does not depend on another."""
    gc.collect()
    torch.cuda.empty_cache()
    if not torch.cuda.is_available():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)


def _peak(name: str, dtype: torch.dtype) -> tuple[float, str]:
    gpu = recognised(name) if torch.cuda.is_available() and dtype.itemsize == 2 else None
    if gpu is not None:
        return gpu.flops, f"datasheet of {gpu.name}, dense bf16"
    sizes = (4096, 8192) if torch.cuda.is_available() else (1024, 2048)
    best, size = max((_matmul_flops(size, dtype), size) for size in sizes)
    kind = str(dtype).removeprefix("torch.")
    return best, f"measured: best {kind} matrix multiplication, {size} x {size}"


def _matmul_flops(size: int, dtype: torch.dtype, repeats: int = 5) -> float:
    device = torch.cuda.current_device()
    a = torch.randn(size, size, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _data_bytes() -> int | None:
    """What RLIMIT_DATA counts of this process; None where the kernel does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(r"VmData:\s+(\d+) kB", status.read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else None
