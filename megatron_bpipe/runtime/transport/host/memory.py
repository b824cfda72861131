"""Host memory for activations: asked for in advance, touched in advance.

Its pages are

- huge where the kernel has them (``MADV_HUGEPAGE``): fewer to touch, and to pin;
- not inherited by a forked child (``MADV_DONTFORK``): Megatron's ``--async-save`` and data loaders
  fork, and the kernel copies pinned pages of a private mapping at the fork instead of sharing them;
- touched by threads on the processors next to the GPU, if it is known where that is: the kernel
  gives a thread pages of its own NUMA node. Unlike ``mbind`` a container may do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megatron_bpipe.runtime.transport.base import TransportError
from megatron_bpipe.runtime.transport.host.limits import available_bytes, one_at_a_time

HUGE_PAGE = 2 * 2**20
MOST_THREADS = 8
LEAST_A_THREAD = 64 * 2**20
_MADV_POPULATE_WRITE = 23  # Linux 5.14, asm-generic/mman-common.h


def check_available(wanted: int, pair: str) -> None:
    """The kernel would rather kill a process than refuse pages, so look first.

    Raises:
        TransportError: with both numbers.
    """
    available = available_bytes()
    if available is not None and wanted > available:
        raise no_memory(pair, wanted, f"there are {available} bytes available")


def no_memory(pair: str, wanted: int, why: str) -> TransportError:
    """The error of a pool that does not fit."""
    return TransportError(
        f"pair {pair}: no host memory for a pool of {wanted} bytes ({why}); "
        "use a larger --bpipe-budget, a smaller micro-batch or fewer ranks a host"
    )


def anonymous(size: int, pair: str, processors: Collection[int] = ()) -> torch.Tensor:
    """``size`` bytes outside malloc, every page touched; given back when the tensor goes.

    Outside malloc, so that what the allocator says is what activations take.

    Args:
        size: in bytes.
        pair: the pair's name, for messages.
        processors: on whose NUMA node the pages should lie; none: anywhere.

    Raises:
        TransportError: the host has not got them.
    """
    with one_at_a_time(pair):
        check_available(size, pair)
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_DONTFORK)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            segment = torch.frombuffer(memory, dtype=torch.uint8)
            _touch(segment.data_ptr(), size, processors)
        except OSError as error:
            raise no_memory(pair, size, str(error)) from error
    return segment


def _touch(address: int, size: int, processors: Collection[int]) -> None:
    """Touch every page, with several threads where there is much."""
    usable = os.sched_getaffinity(0)
    near = usable.intersection(processors) or usable
    threads = max(1, min(MOST_THREADS, len(near), size // LEAST_A_THREAD))
    share = -(-size // threads // HUGE_PAGE) * HUGE_PAGE
    starts = range(0, size, share)
    with ThreadPoolExecutor(threads) as pool:
        touch = functools.partial(_touch_share, near)
        sizes = [min(share, size - at) for at in starts]
        list(pool.map(touch, [address + at for at in starts], sizes))


def _touch_share(processors: set[int], address: int, size: int) -> None:
    os.sched_setaffinity(0, processors)  # of this thread alone
    if _libc().madvise(address, size, _MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise OSError(code, os.strerror(code))
    ctypes.memset(address, 0, size)  # an older kernel


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.madvise.restype = ctypes.c_int
    return libc
