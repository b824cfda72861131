"""A transport that was asked for but cannot reach: every rank learns of it before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_bpipe.integration.log import abort
from megatron_bpipe.runtime.transport.pair.rendezvous import Identity
from megatron_bpipe.schedule.ops import is_evictor

ON_ONE_HOST = ("shm", "ipc")


@dataclass(frozen=True)
class Seat:
    """Where a rank is, and the rank of its pair's acceptor if it may evict."""

    host: str
    namespace: str
    stage: int
    acceptor: int | None


def check_forced_transport(
    transport: str, pipeline: Sequence[int], stage: int, any_pair: bool = False
) -> None:
    """Stop every rank if ``transport`` needs one host and some pair is on two.

    With ``any_pair`` any two stages of a pipeline may become one (``--bpipe-balance measured``).

    A pair finds this out by itself, but then the other ranks only see their connections close. Call
    it on all ranks, with the global ranks of this rank's pipeline and its stage in it.

    Raises:
        Abort: some pair cannot use it.
    """
    if transport not in ON_ONE_HOST:
        return
    me, p = Identity.mine(), len(pipeline)
    acceptor = pipeline[p - 1 - stage] if is_evictor(stage, p) else None
    if any_pair:
        acceptor = pipeline[0]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, Seat(me.host, me.namespace, stage, acceptor))
    apart = pairs_apart(everyone)
    if apart:
        evictor, acceptor = apart[0]
        if any_pair:
            abort(
                f"--bpipe-transport {transport} with --bpipe-balance measured needs all stages of "
                f"a pipeline on one host (and in one PID namespace), but ranks {evictor} and "
                f"{acceptor} are not: leave the transport to auto, or use p2p",
                on_every_rank=True,
            )
        abort(
            f"--bpipe-transport {transport} needs both ranks of a pair on one host (and in one PID "
            f"namespace), but {len(apart)} pair(s) are not, the first ranks {evictor} and "
            f"{acceptor}: drop --bpipe-placement megatron so that pairs share a node, or use p2p",
            on_every_rank=True,
        )


def pairs_apart(everyone: Sequence[Seat]) -> list[tuple[int, int]]:
    """Evictor and acceptor of every pair that is not on one host, by global rank."""
    return [
        (rank, seat.acceptor)
        for rank, seat in enumerate(everyone)
        if seat.acceptor is not None
        and (seat.host, seat.namespace)
        != (everyone[seat.acceptor].host, everyone[seat.acceptor].namespace)
    ]
