"""Hooks for a rank of a real run: the transports of `runtime/transport/cuda`, on the stand-in."""

from __future__ import annotations

from typing import Any

import torch

CPU = torch.device("cpu")


def instead(job: dict[str, Any], transport: str) -> None:
    """Use ``ipc`` where the run would use shm, with late copies; or ``nccl`` where it would p2p.

    nccl's messages are gloo's here: they block the host, so the run also shows that the order of
    the messages is free of deadlocks.
    """
    from megatron_bpipe.integration import stage_pools
    from megatron_bpipe.runtime.transport import PoolRequest
    from megatron_bpipe.runtime.transport.cuda.ipc import IpcAcceptor, ipc_transport
    from megatron_bpipe.runtime.transport.cuda.messages import NcclAcceptor, NcclTransport
    from megatron_bpipe.runtime.transport.pair.negotiate import Pair
    from tests.harness.stand_in_gpu import simulated_gpu

    entered: list[Any] = []

    stock = stage_pools.end_of_pair

    def end_of_pair(*positional: Any, **named: Any) -> Any:
        """From the first pool on, when the CPU backend has put its own streams in place."""
        if not entered:
            entered.append(simulated_gpu(late=transport == "ipc"))
            entered[0].__enter__()  # until the rank ends
        return stock(*positional, **named)

    def open_evictor(pair: Pair, request: PoolRequest, offer: str) -> Any:
        if transport == "ipc":
            return ipc_transport(pair.rendezvous, offer, CPU)
        return NcclTransport(pair.group, pair.rendezvous.pair, request, CPU)

    def open_acceptor(pair: Pair, request: PoolRequest) -> Any:
        if transport == "ipc":
            return IpcAcceptor(pair.rendezvous, request, CPU)
        return NcclAcceptor(pair.group, pair.rendezvous.pair, request, CPU)

    stage_pools.end_of_pair = end_of_pair
    Pair.open_evictor, Pair.open_acceptor = open_evictor, open_acceptor  # type: ignore[method-assign]


def hasty(job: dict[str, Any]) -> None:
    """Let copies start without waiting for the computation before them."""
    from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies

    def begin(copies: StreamCopies) -> Any:
        start = torch.cuda.Event(enable_timing=True)
        start.record(copies.stream)
        return start

    StreamCopies.begin = begin  # type: ignore[method-assign]
