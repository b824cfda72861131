"""A stand-in for a GPU's streams and for its driver, to run `runtime/transport/cuda` on a CPU.

What it can show: that the code runs at all, that the calls go to the driver with their arguments in
place (a real library, built from driver.c, that two processes can share memory through), and that
every copy is waited for before its bytes are used or its memory is given away, since copies run as
late as the events allow (streams.py); that every copy waits for the computation that makes its
bytes or still uses its target (computation.py); that none reaches past the end of the memory it
begins in; and that memory is freed, unmapped or unpinned only when no copy and no other process
uses it. What only a GPU can show: whether contexts are in place, speed, and what the real driver
refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_bpipe.runtime.transport.cuda import driver
from tests.harness.stand_in_gpu import streams

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("cc") is None, reason="the stand-in for the CUDA driver needs a C compiler"
)
INSTEAD = "tests.harness.stand_in_gpu.in_rank:instead"
"""As a hook of a training: its transport becomes that for GPUs, on the stand-in."""
SOURCE = Path(__file__).with_name("driver.c")
Release = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_size_t)
Copy = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
)


NEWEST = 13000
INVALID_VALUE = 1


@functools.cache
def _build(release: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "libcuda.so")
        command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-DCUDA={release}"]
        subprocess.run([*command, "-o", path, SOURCE], check=True)
        return ctypes.CDLL(str(path))


_releases = [NEWEST]


def library() -> Any:
    """The stand-in for libcuda in use, built once a process."""
    return _build(_releases[-1])


def number(name: str, to: int | None = None) -> int:
    """A number of the stand-in: what it is; or was, where it is set to another one."""
    variable = ctypes.c_int.in_dll(library(), f"stand_in_{name}")
    found = variable.value
    if to is not None:
        variable.value = to
    return found


def bytes_of(kind: str) -> int:
    """Bytes now ``allocated``, ``mapped`` from another process, or ``pinned``."""
    function = library().stand_in_bytes
    function.restype, function.argtypes = ctypes.c_size_t, (ctypes.c_char,)
    return int(function(kind[0].encode()))


def set_capacity(size: int) -> None:
    """Bytes the device has."""
    ctypes.c_size_t.in_dll(library(), "stand_in_capacity").value = size


def set_devices(count: int) -> None:
    """GPUs that the driver shows."""
    number("devices", count)


def forbid_ipc(forbidden: bool) -> None:
    """Whether opening another process's memory is refused."""
    number("ipc_forbidden", int(forbidden))


def _memory(device: Any = None) -> tuple[int, int]:
    """Bytes free and in all."""
    capacity = ctypes.c_size_t.in_dll(library(), "stand_in_capacity").value
    return capacity - bytes_of("allocated"), capacity


@Copy
def _queue_copy(target: int, source: int, size: int, stream: int) -> int:
    return 0 if streams.copy(stream, target, source, size, ctypes.memmove) else INVALID_VALUE


@Release
def _on_release(address: int, size: int) -> None:
    for target, source, length in streams.copies_under_way():
        if any(at < address + size and address < at + length for at in (target, source)):
            streams.violations.append("memory is given back that a copy still uses")


_CDLL = ctypes.CDLL


def _load(name: Any, *positional: Any, **named: Any) -> Any:
    """Stand in for ``ctypes.CDLL``: the driver is the stand-in, all else what it is."""
    return library() if name == "libcuda.so.1" else _CDLL(name, *positional, **named)


@contextlib.contextmanager
def simulated_gpu(
    *, late: bool = True, one_process: bool = False, release: int = NEWEST
) -> Iterator[None]:
    """Let ``runtime/transport/cuda`` run on the CPU; entered by the thread that computes.

    Args:
        late: copies run as late as the events allow; False: at once.
        one_process: a process may open its own memory by IPC, which CUDA refuses.
        release: of CUDA, as ``cuDriverGetVersion`` says it.
    """
    _releases.append(release)
    loaded = library()
    number("one_process", int(one_process))
    for name, callback in (
        ("stand_in_on_copy", _queue_copy),
        ("stand_in_on_release", _on_release),
    ):
        address = ctypes.cast(callback, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(loaded, name).value = address
    stand_ins: dict[str, Any] = {
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.Within,
        "current_stream": streams.current_stream,
        "device": lambda device: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "mem_get_info": _memory,
    }
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(streams, "LATE", late))
        for name, stand_in in stand_ins.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        patches.enter_context(
            mock.patch.object(torch.cuda.nvtx, "range", return_value=contextlib.nullcontext())
        )
        patches.enter_context(mock.patch.object(ctypes, "CDLL", _load))
        driver._library.cache_clear()
        driver._library()
        patches.enter_context(streams.fresh())
        yield
    driver._library.cache_clear()
    _releases.pop()
    assert not streams.violations, set(streams.violations)
