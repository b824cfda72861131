"""The one-sided transport on one host: a pool that the acceptor allocates and only lends.

    evictor                               acceptor
                                          allocates a memfd, touches every page
    maps the pool                     <-  offers it (pid, descriptor, bytes)
    writes and reads it, alone            never looks at it again

A memfd has no name: nothing can stay behind whoever dies, and Docker's 64 MiB ``/dev/shm`` does
not limit it. Should a micro-batch not fit, the evictor lengthens the file itself.
"""

from __future__ import annotations

import json
import mmap
import os

import torch

from megatron_bpipe.runtime.transport.base import PoolRequest, TransportError
from megatron_bpipe.runtime.transport.copies import ThreadCopies
from megatron_bpipe.runtime.transport.host.limits import one_at_a_time
from megatron_bpipe.runtime.transport.host.memory import check_available, no_memory
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.schedule.ops import PartKey


class SharedMemoryAcceptor:
    """The acceptor's end: allocates the pool, touches its pages, keeps it until closed.

    Args:
        pair: the pair's name, for messages.
        request: what the evictor asks for.

    Raises:
        TransportError: there is no memory for the pool.
    """

    def __init__(self, pair: str, request: PoolRequest) -> None:
        wanted = max(request.pool_bytes, mmap.PAGESIZE)
        check_available(wanted, pair)
        try:
            self._descriptor = os.memfd_create(f"bpipe-{pair}")
            os.posix_fallocate(self._descriptor, 0, wanted)  # raises now, not SIGBUS later
        except OSError as error:
            raise no_memory(pair, wanted, str(error)) from error
        self.offer = json.dumps([os.getpid(), self._descriptor, wanted])

    @property
    def pool_bytes(self) -> int:
        """Bytes of the file now, the evictor's extensions included."""
        return os.fstat(self._descriptor).st_size

    def accept(self, key: PartKey) -> None:
        """Nothing to do: the evictor writes by itself."""

    def give_back(self, key: PartKey) -> None:
        """Nothing to do: the evictor reads by itself."""

    def finish(self) -> None:
        """Nothing can be under way on this side."""

    def forget(self) -> None:
        """The evictor keeps the books."""

    def close(self) -> None:
        """Free the pool (its pages go when the evictor has unmapped them too)."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SharedMemory:
    """The evictor's view of the lent pool; see `PoolMemory`.

    Args:
        rendezvous: with the acceptor, which must be on this host.
        offer: the acceptor's.
    """

    def __init__(self, rendezvous: PairRendezvous, offer: str) -> None:
        self._rendezvous = rendezvous
        self._offer = offer
        self._descriptor = -1

    def map(self) -> torch.Tensor:
        """Map what is lent.

        Raises:
            TransportError: it cannot be opened from here.
        """
        pid, descriptor, size = json.loads(self._offer)
        path = f"/proc/{pid}/fd/{descriptor}"
        try:
            self._descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise TransportError(
                f"pair {self._rendezvous.pair}: cannot open the pool lent at {path} ({error}); "
                "both ranks must run on one host, as one user, in one PID namespace (one container "
                "per node); or use --bpipe-transport p2p"
            ) from error
        return self._map(0, size)

    def grow(self, size: int) -> torch.Tensor:
        """Lengthen the file.

        Raises:
            TransportError: the host has no memory left.
        """
        pair = self._rendezvous.pair
        old = os.fstat(self._descriptor).st_size
        start = -(-old // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with one_at_a_time(pair):
            check_available(size, pair)
            try:
                os.posix_fallocate(self._descriptor, start, size)
            except OSError as error:
                raise no_memory(pair, size, str(error)) from error
        return self._map(start, size)

    def check(self) -> None:
        """See `PoolMemory`."""
        self._rendezvous.check_peer()

    @property
    def hosted_bytes(self) -> int:
        """See `PoolMemory`: the pool is the acceptor's."""
        return 0

    def close(self) -> None:
        """See `PoolMemory`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _map(self, start: int, size: int) -> torch.Tensor:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(self._descriptor, size, flags=flags, offset=start)
        return torch.frombuffer(memory, dtype=torch.uint8)


def shared_memory_transport(rendezvous: PairRendezvous, offer: str) -> OneSidedTransport:
    """The evictor's end; arguments as for `SharedMemory`."""
    memory = SharedMemory(rendezvous, offer)
    return OneSidedTransport(rendezvous.pair, memory, ThreadCopies(rendezvous.deadline))
