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
    from megatron_bpipe.runtime.transport.cuda.ipc import IpcAcceptor, ipc_transport
    from megatron_bpipe.runtime.transport.cuda.messages import NcclAcceptor, NcclTransport
    from megatron_bpipe.runtime.transport.pair.negotiate import Pair
    from tests.harness.stand_in_gpu import simulated_gpu

    entered: list[Any] = []

    def stand_in() -> None:
        """From the first transport on, when the CPU backend has put its own streams in place."""
        if not entered:
            entered.append(simulated_gpu(late=transport == "ipc"))
            entered[0].__enter__()  # until the rank ends

    def open_evictor(pair: Pair, microbatch_bytes: int, slots: int) -> Any:
        stand_in()
        if transport == "ipc":
            return ipc_transport(pair.rendezvous, microbatch_bytes * slots, CPU)
        return NcclTransport(pair.group, pair.rendezvous, microbatch_bytes, slots, CPU)

    def open_acceptor(pair: Pair) -> Any:
        stand_in()
        if transport == "ipc":
            return IpcAcceptor(pair.rendezvous, CPU)
        return NcclAcceptor(pair.group, pair.rendezvous, CPU)

    Pair.open_evictor, Pair.open_acceptor = open_evictor, open_acceptor  # type: ignore[method-assign]
