"""What this node can still give: the kernel's figure, and the limits of its control groups.

Ranks of one node allocate their pools at about the same time. Each holds `one_at_a_time` while it
looks and touches its pages, so each sees what the others have taken: the figures below are the
node's, and need no sum over ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_bpipe.runtime.transport.base import TransportError

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
SECONDS_TO_WAIT = 300.0
UNLIMITED = 2**60  # version 1 writes a number near 2**63 where there is no limit


def available_bytes() -> int | None:
    """Memory this process can still take before the kernel kills something; None: unknown."""
    left = [limit - used for limit, used in _groups() if limit is not None and used is not None]
    kernel = _meminfo("MemAvailable")
    known = left if kernel is None else [kernel, *left]
    return max(0, min(known)) if known else None


def limit_bytes() -> int | None:
    """The smallest limit of the control groups this process is in; None where there is none."""
    limits = [limit for limit, _ in _groups() if limit is not None]
    return min(limits) if limits else None


@contextlib.contextmanager
def one_at_a_time(pair: str) -> Iterator[None]:
    """No other process of this node that asks for this is between looking and taking.

    The lock is on ``/proc/meminfo`` itself: nothing has to be created, and it goes with the
    process. Whoever holds it waits for the kernel only, never for another rank.

    Raises:
        TransportError: another process has held it for `SECONDS_TO_WAIT`.
    """
    try:
        descriptor = os.open(MEMINFO, os.O_RDONLY)
    except OSError:  # no such figure here, so nothing to look at
        yield
        return
    try:
        until = time.monotonic() + SECONDS_TO_WAIT
        while not _locked(descriptor):
            if time.monotonic() > until:
                raise TransportError(
                    f"pair {pair}: another process of this node has been allocating host memory "
                    f"for {SECONDS_TO_WAIT:.0f} s (it holds a lock on {MEMINFO}; see lslocks)"
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _meminfo(name: str) -> int | None:
    if not MEMINFO.exists():
        return None
    for line in MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _groups() -> Iterator[tuple[int | None, int | None]]:
    """Limit and use of the memory control group of this process and of each above it.

    Pages of files that the kernel can drop at once are not use. Version 2 has one tree; version 1
    one for memory, and its files have other names. In a container the tree begins at its own group.
    """
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = MOUNT / "memory" if controllers else MOUNT
        # where the container does not see the tree above it, the path does not exist: its own root
        group = root / path.strip("/") if (root / path.strip("/")).is_dir() else root
        while True:
            if controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                names = ("memory.max", "memory.current", "inactive_file")
            yield _limit_and_use(group, *names)
            if group == root:
                break
            group = group.parent


def _limit_and_use(
    group: Path, limit: str, use: str, droppable: str
) -> tuple[int | None, int | None]:
    used = _number(group / use)
    if used is not None:
        used -= _statistic(group / "memory.stat", droppable)
    return _number(group / limit), used


def _number(path: Path) -> int | None:
    """What a file holds; None for no limit, and where there is no such file."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < UNLIMITED else None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(value) for key, value in map(str.split, lines) if key == name), 0)
