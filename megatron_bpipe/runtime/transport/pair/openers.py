"""How each transport's two ends are opened, once a pair has agreed on it; see `TransportSpec`.

What needs a GPU is imported when it is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bpipe.runtime.transport.base import AcceptorEnd, PoolRequest, Transport
from megatron_bpipe.runtime.transport.host.own import NoPool, host_transport
from megatron_bpipe.runtime.transport.shared_memory import (
    SharedMemoryAcceptor,
    shared_memory_transport,
)
from megatron_bpipe.runtime.transport.two_sided import TwoSidedAcceptor, TwoSidedTransport

if TYPE_CHECKING:
    from megatron_bpipe.runtime.transport.pair.negotiate import Pair


def ipc_evictor(pair: Pair, request: PoolRequest, offer: str) -> Transport:
    """Maps what the acceptor's GPU lends."""
    from megatron_bpipe.runtime.transport.cuda.ipc import ipc_transport

    return ipc_transport(pair.rendezvous, offer, pair.device)


def ipc_acceptor(pair: Pair, request: PoolRequest) -> AcceptorEnd:
    """Allocates the pool on its GPU."""
    from megatron_bpipe.runtime.transport.cuda.ipc import IpcAcceptor

    return IpcAcceptor(pair.rendezvous, request, pair.device)


def shm_evictor(pair: Pair, request: PoolRequest, offer: str) -> Transport:
    """Maps the acceptor's memfd."""
    return shared_memory_transport(pair.rendezvous, offer)


def shm_acceptor(pair: Pair, request: PoolRequest) -> AcceptorEnd:
    """Allocates the pool as a memfd."""
    return SharedMemoryAcceptor(pair.rendezvous.pair, request)


def p2p_evictor(pair: Pair, request: PoolRequest, offer: str) -> Transport:
    """Sends and receives, over NCCL or gloo."""
    name, deadline = pair.rendezvous.pair, pair.rendezvous.deadline
    if pair.device.type != "cuda":
        return TwoSidedTransport(pair.group, name, deadline)
    from megatron_bpipe.runtime.transport.cuda.messages import NcclTransport

    return NcclTransport(pair.group, name, request, pair.device)


def p2p_acceptor(pair: Pair, request: PoolRequest) -> AcceptorEnd:
    """Receives and sends back, over NCCL or gloo."""
    name, deadline = pair.rendezvous.pair, pair.rendezvous.deadline
    if pair.device.type != "cuda":
        return TwoSidedAcceptor(pair.group, name, pair.device, deadline)
    from megatron_bpipe.runtime.transport.cuda.messages import NcclAcceptor

    return NcclAcceptor(pair.group, name, request, pair.device)


def host_evictor(pair: Pair, request: PoolRequest, offer: str) -> Transport:
    """Takes host memory of its own."""
    rendezvous = pair.rendezvous
    return host_transport(rendezvous.pair, request.pool_bytes, pair.device, rendezvous.deadline)


def host_acceptor(pair: Pair, request: PoolRequest) -> AcceptorEnd:
    """Lends nothing."""
    return NoPool()
