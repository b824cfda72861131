"""The one-sided transport on one host: a pool that the acceptor allocates and only lends.

    evictor                               acceptor
    F0 ends: says what it wants       ->  allocates a memfd of that size, touches every page
    maps the pool                     <-  says where it is (pid, descriptor, bytes)
    writes and reads it, alone            never looks at it again

A memfd has no name: nothing can stay behind whoever dies, and Docker's 64 MiB ``/dev/shm`` does
not limit it. Should a micro-batch not fit, the evictor lengthens the file itself.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..activation import padded
from .base import TransportError
from .meeting import Meeting
from .room import Extent, Room
from .worker import Job, Worker


class SharedMemoryLender:
    """The acceptor's end: allocates the pool, touches its pages, keeps it until closed.

    Raises:
        TransportError: the evictor does not ask in time, or there is no memory for the pool.
    """

    def __init__(self, meeting: Meeting) -> None:
        wanted = int(meeting.hear("want"))
        _check_available(wanted, meeting.pair)
        try:
            self._descriptor = os.memfd_create(f"bpipe-{meeting.pair}")
            os.posix_fallocate(self._descriptor, 0, wanted)  # raises now, not SIGBUS later
        except OSError as error:
            raise _no_memory(meeting.pair, wanted, str(error)) from error
        meeting.tell("lend", json.dumps([os.getpid(), self._descriptor, wanted]))

    @property
    def pool_bytes(self) -> int:
        """Bytes of the file now, the evictor's extensions included."""
        return os.fstat(self._descriptor).st_size

    def accept(self, microbatch: int) -> None:
        """Nothing to do: the evictor writes by itself."""

    def give_back(self, microbatch: int) -> None:
        """Nothing to do: the evictor reads by itself."""

    def finish(self) -> None:
        """Nothing can be under way on this side."""

    def close(self) -> None:
        """Free the pool (its pages go when the evictor has unmapped them too)."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SharedMemoryTransport:
    """The evictor's end.

    Args:
        meeting: with the acceptor, which must be on this host.
        wanted: bytes of the pool to ask for.
    """

    def __init__(self, meeting: Meeting, wanted: int) -> None:
        self.pair = meeting.pair
        self._meeting = meeting
        self._segments: list[torch.Tensor] = []
        self._room = Room()
        self._worker = Worker(meeting.deadline)
        self._descriptor = -1
        meeting.tell("want", str(max(wanted, mmap.PAGESIZE)))

    def evict(self, microbatch: int, pieces: Sequence[torch.Tensor]) -> Job:
        """See `Transport`."""
        size = sum(padded(p.numel()) for p in pieces)
        extent = self._take(microbatch, size)
        return self._copy(f"E{microbatch} to {self.pair}", self._slot(extent, pieces), pieces)

    def load(self, microbatch: int, pieces: Sequence[torch.Tensor]) -> Job:
        """See `Transport`."""
        extent = self._room.taken[microbatch]
        slot = self._slot(extent, pieces)
        return self._copy(f"L{microbatch} from {self.pair}", pieces, slot)

    def release(self, microbatch: int) -> None:
        """See `Transport`."""
        self._room.give_back(microbatch)

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return self._room.occupied

    def close(self) -> None:
        """See `Transport`."""
        self._worker.close()
        self._segments.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _copy(
        self, label: str, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> Job:
        targets, sources = list(targets), list(sources)

        def copy() -> None:
            # one call for a whole micro-batch lets the interpreter lock go once, so the main
            # thread keeps computing; a copy a storage would ask for the lock dozens of times
            torch._foreach_copy_(targets, sources)

        return self._worker.start(label, copy)

    def _take(self, microbatch: int, size: int) -> Extent:
        if self._descriptor < 0:
            self._map_lent_pool()
        extent = self._room.take(microbatch, size)
        if extent is None:
            self._lengthen(size)
            extent = self._room.take(microbatch, size)
        assert extent is not None
        return extent

    def _map_lent_pool(self) -> None:
        pid, descriptor, size = json.loads(self._meeting.hear("lend"))
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            self._descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise TransportError(
                f"pair {self.pair}: cannot open the pool lent at {path} ({error}); both ranks must "
                "run on one host, as one user, in one PID namespace (one container per node); "
                "or use --bpipe-transport p2p"
            ) from error
        self._map(0, size)

    def _lengthen(self, size: int) -> None:
        old = os.fstat(self._descriptor).st_size
        start = -(-old // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        _check_available(size, self.pair)
        try:
            os.posix_fallocate(self._descriptor, start, size)
        except OSError as error:
            raise _no_memory(self.pair, size, str(error)) from error
        self._map(start, size)

    def _map(self, start: int, size: int) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(self._descriptor, size, flags=flags, offset=start)
        self._segments.append(torch.frombuffer(memory, dtype=torch.uint8))
        self._room.add_segment(size)

    def _slot(self, extent: Extent, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        segment, at, slot = self._segments[extent.segment], extent.start, []
        for piece in pieces:
            slot.append(segment[at : at + piece.numel()])
            at += padded(piece.numel())
        return slot


def available_bytes() -> int | None:
    """Memory this host can still give, None where the kernel does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _check_available(wanted: int, pair: str) -> None:
    """The kernel would rather kill a process than refuse pages, so look first."""
    available = available_bytes()
    if available is not None and wanted > available:
        raise _no_memory(pair, wanted, f"the host has {available} bytes available")


def _no_memory(pair: str, wanted: int, why: str) -> TransportError:
    return TransportError(
        f"pair {pair}: no memory for a pool of {wanted} bytes on the acceptor's host ({why}); "
        "use a larger --bpipe-budget, a smaller micro-batch or fewer ranks a host"
    )
