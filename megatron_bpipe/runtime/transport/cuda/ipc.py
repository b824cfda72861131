"""The one-sided transport between GPUs of one node: a pool that the acceptor lends by CUDA IPC.

    evictor                               acceptor
                                          allocates the pool on its GPU
    maps the pool                     <-  offers it (handle, bytes)
    writes and reads it, alone            never looks at it again
    closes: unmaps, says so           ->  frees it

The acceptor gets no call and no kernel. A micro-batch that does not fit into the pool goes to the
evictor's own pinned host memory instead: the pool cannot grow without the acceptor, and a transfer
must not fail half-way.
"""

from __future__ import annotations

import contextlib
import json

import torch

from megatron_bpipe.runtime.torch_internals import storage_at
from megatron_bpipe.runtime.transport.base import PoolRequest, TransportError
from megatron_bpipe.runtime.transport.copies import Part
from megatron_bpipe.runtime.transport.cuda import driver
from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies
from megatron_bpipe.runtime.transport.host.own import HostMemory
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.schedule.ops import PartKey

GRANULE = 2 * 2**20
SECONDS_TO_UNMAP = 10.0


class IpcAcceptor:
    """The acceptor's end: allocates the pool and keeps it until the evictor has unmapped it.

    Args:
        rendezvous: with the evictor, to hear when it has unmapped the pool.
        request: what the evictor asks for.
        device: where this rank computes.

    Raises:
        TransportError: the GPU has no memory for the pool.
    """

    def __init__(
        self, rendezvous: PairRendezvous, request: PoolRequest, device: torch.device
    ) -> None:
        self._rendezvous = rendezvous
        # CUDA shares whole 2 MiB pages: a smaller pool would show its neighbours too
        self.pool_bytes = max(1, -(-request.pool_bytes // GRANULE)) * GRANULE
        self._address = allocate(self.pool_bytes, device, rendezvous.pair)
        self.offer = json.dumps([driver.share(self._address).hex(), self.pool_bytes])

    def accept(self, key: PartKey) -> None:
        """Nothing to do: the evictor writes by itself."""

    def give_back(self, key: PartKey) -> None:
        """Nothing to do: the evictor reads by itself."""

    def finish(self) -> None:
        """Nothing can be under way on this side."""

    def forget(self) -> None:
        """The evictor keeps the books."""

    def close(self) -> None:
        """Free the pool once it is unmapped over there.

        An evictor that neither says so nor is dead may still have it mapped: then it stays
        allocated until this process ends, since memory freed under a mapping is undefined.
        """
        if not self._address:
            return
        self._rendezvous.deadline = SECONDS_TO_UNMAP
        try:
            self._rendezvous.get("unmapped")
        except TransportError:
            if self._rendezvous.peer is None or not self._rendezvous.peer.died():
                return
        driver.free(self._address)
        self._address = self.pool_bytes = 0


class IpcMemory:
    """The evictor's view of the lent pool; see `PoolMemory`.

    Args:
        rendezvous: with the acceptor, which must be on this node.
        offer: the acceptor's.
        device: where this rank computes.
    """

    def __init__(self, rendezvous: PairRendezvous, offer: str, device: torch.device) -> None:
        self._rendezvous = rendezvous
        self._offer = offer
        self._device = device
        self._address = 0
        self._spill = HostMemory(rendezvous.pair, 0, device)

    def map(self) -> torch.Tensor:
        """Map what is lent.

        Raises:
            TransportError: it cannot be mapped.
        """
        handle, size = json.loads(self._offer)
        try:
            with torch.cuda.device(self._device):
                self._address = driver.open_shared(bytes.fromhex(handle))
        except driver.DriverError as error:
            raise TransportError(
                f"pair {self._rendezvous.pair}: the pool lent by the acceptor cannot be mapped "
                f"({error}); use --bpipe-transport host"
            ) from error
        return tensor_at(self._address, size, self._device)

    def grow(self, size: int) -> torch.Tensor:
        """See `PoolMemory`: pinned host memory."""
        return self._spill.grow(size)

    def check(self) -> None:
        """See `PoolMemory`."""
        self._rendezvous.check_peer()

    @property
    def hosted_bytes(self) -> int:
        """See `PoolMemory`."""
        return self._spill.hosted_bytes

    def close(self) -> None:
        """See `PoolMemory`."""
        if self._address:
            driver.close_shared(self._address)
            self._address = 0
        self._rendezvous.publish("unmapped", "")
        self._spill.close()


def ipc_transport(
    rendezvous: PairRendezvous, offer: str, device: torch.device
) -> OneSidedTransport:
    """The evictor's end; arguments as for `IpcMemory`."""
    memory = IpcMemory(rendezvous, offer, device)
    return OneSidedTransport(rendezvous.pair, memory, StreamCopies(device))


def allocate(size: int, device: torch.device, pair: str) -> int:
    """A pool on ``device``, beside the caching allocator; returns its address.

    Raises:
        TransportError: there is no room; with what is wanted and what there is.
    """
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # binds this thread to the device's context
        with contextlib.suppress(driver.DriverError):
            return driver.allocate(size)
        torch.cuda.empty_cache()  # what the caching allocator has but does not use
        try:
            return driver.allocate(size)
        except driver.DriverError as error:
            free, total = torch.cuda.mem_get_info(device)
            raise TransportError(
                f"pair {pair}: no room for a pool of {size} bytes on the acceptor's GPU: {free} of "
                f"{total} bytes are free ({error}); use a larger --bpipe-budget, a smaller "
                "micro-batch, or --bpipe-transport host"
            ) from error


def tensor_at(address: int, size: int, device: torch.device) -> torch.Tensor:
    """A flat uint8 tensor on memory that is not torch's; it does not own it."""
    storage = storage_at(address, size, device)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))


class Trial:
    """The acceptor's part of finding out whether IPC works at all: a little memory, lent."""

    def __init__(self, device: torch.device, pair: str) -> None:
        self._address = allocate(GRANULE, device, pair)
        self.handle = driver.share(self._address).hex()

    def close(self) -> None:
        """The evictor is done with it."""
        driver.free(self._address)


def try_to_open(handle: str, device: torch.device) -> str:
    """The evictor's part: map, write, read back.

    Returns:
        What stands in the way, whatever it is; "" if nothing does.
    """
    try:
        with torch.cuda.device(device):
            address = driver.open_shared(bytes.fromhex(handle))
            try:
                return _write_and_read(tensor_at(address, GRANULE, device), device)
            finally:
                driver.close_shared(address)
    except Exception as error:  # of the driver, of torch, of a library that lacks a call
        return str(error) or type(error).__name__


def _write_and_read(there: torch.Tensor, device: torch.device) -> str:
    sent = torch.arange(256, dtype=torch.uint8, device=device)
    back = torch.zeros_like(sent)
    copies = StreamCopies(device)
    copies.start("trial", [Part(there, 0, sent, 0, 256)], out=True).wait()
    copies.start("trial", [Part(there, 0, back, 0, 256)], out=False).wait()
    copies.close()
    return "" if torch.equal(sent, back) else "what was written was not what was read"
