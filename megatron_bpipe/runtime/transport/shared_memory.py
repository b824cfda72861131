"""The one-sided transport on one host: a pool that the acceptor allocates and only lends.

    evictor                               acceptor
    F0 ends: posts the bytes it wants ->  reads it at its next step, allocates a memfd, touches
    maps the pool                     <-  every page, posts (host, pid, descriptor, bytes)
    writes and reads it, alone            never looks at it again

A memfd has no name: nothing can stay behind whoever dies, and Docker's 64 MiB ``/dev/shm`` does
not limit it. Should a micro-batch not fit, the evictor lengthens the file itself.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from ..activation import padded
from .base import TransportError
from .copier import Copier, CopyTicket
from .room import Extent, Room


class KeyValueStore(Protocol):
    """The part of torch.distributed's store that the handshake uses."""

    def set(self, key: str, value: str) -> None:
        """Publish ``value``."""

    def get(self, key: str) -> bytes:
        """Wait for ``key``, at most the store's time-out."""


def host_identity() -> str:
    """Same string exactly for processes of one running kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()


class SharedMemoryLender:
    """The acceptor's end: allocates the pool, touches its pages, keeps it until closed.

    Raises:
        TransportError: the evictor asked for nothing within the store's time-out, or the kernel
            has no memory for the pool.
    """

    def __init__(self, store: KeyValueStore, pair: str) -> None:
        wanted = int(_get(store, f"{pair}/want", pair))
        try:
            self._descriptor = os.memfd_create(f"bpipe-{pair}")
            os.ftruncate(self._descriptor, wanted)
            os.posix_fallocate(self._descriptor, 0, wanted)  # raises now, not SIGBUS later
        except OSError as error:
            raise TransportError(
                f"pair {pair}: the acceptor could not allocate a pool of {wanted} bytes ({error}); "
                "raise the memory limit, use a larger --bpipe-budget or fewer GPUs per node"
            ) from error
        offer = {
            "host": host_identity(),
            "pid": os.getpid(),
            "fd": self._descriptor,
            "bytes": wanted,
        }
        store.set(f"{pair}/lend", json.dumps(offer))

    @property
    def pool_bytes(self) -> int:
        """Bytes of the file now, the evictor's extensions included."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Free the pool (its pages go when the evictor has unmapped them too)."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SharedMemoryTransport:
    """The evictor's end.

    Args:
        store: where the two ends find each other.
        pair: name of the pair, the same on both ends.
        wanted: bytes of the pool to ask for.
        deadline: seconds any one copy may take.
    """

    def __init__(self, store: KeyValueStore, pair: str, wanted: int, deadline: float) -> None:
        self.pair = pair
        self._store = store
        self._segments: list[torch.Tensor] = []
        self._room = Room()
        self._copier = Copier(deadline)
        self._descriptor = -1
        store.set(f"{pair}/want", str(max(wanted, mmap.PAGESIZE)))

    def evict(self, microbatch: int, pieces: Sequence[torch.Tensor]) -> CopyTicket:
        """See `Transport`."""
        size = sum(padded(p.numel()) for p in pieces)
        extent = self._take(microbatch, size)
        return self._copier.copy(
            f"E{microbatch} to {self.pair}", self._slot(extent, pieces), pieces
        )

    def load(self, microbatch: int, pieces: Sequence[torch.Tensor]) -> CopyTicket:
        """See `Transport`."""
        extent = self._room.taken[microbatch]
        slot = self._slot(extent, pieces)
        return self._copier.copy(f"L{microbatch} from {self.pair}", pieces, slot)

    def release(self, microbatch: int) -> None:
        """See `Transport`."""
        self._room.give_back(microbatch)

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return self._room.occupied

    def close(self) -> None:
        """See `Transport`."""
        self._copier.close()
        self._segments.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

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
        offer = json.loads(_get(self._store, f"{self.pair}/lend", self.pair))
        if offer["host"] != host_identity():
            raise TransportError(
                f"pair {self.pair}: evictor and acceptor run on different hosts, which share no "
                "memory; place pairs on one node"
            )
        path = f"/proc/{offer['pid']}/fd/{offer['fd']}"
        try:
            self._descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise TransportError(
                f"pair {self.pair}: cannot open the pool lent at {path} ({error}); both ranks must "
                "run as one user in one PID namespace (one container per node)"
            ) from error
        self._map(0, offer["bytes"])

    def _lengthen(self, size: int) -> None:
        old = os.fstat(self._descriptor).st_size
        start = -(-old // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            os.posix_fallocate(self._descriptor, start, size)
        except OSError as error:
            raise TransportError(
                f"pair {self.pair}: a micro-batch of {size} bytes does not fit into the pool of "
                f"{old} bytes, and the host has no memory to lengthen it ({error})"
            ) from error
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


def _get(store: KeyValueStore, key: str, pair: str) -> bytes:
    try:
        return store.get(key)
    except Exception as error:
        raise TransportError(
            f"pair {pair}: the other end did not answer within the store's time-out ({error})"
        ) from error
