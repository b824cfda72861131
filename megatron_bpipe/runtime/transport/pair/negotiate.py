"""Choose a pair's transport; the first half of the handshake (handshake.py).

both        say where they are (process, GPU)
evictor     lists what is open to the pair, best first; tries CUDA IPC if that is the best
evictor     says what was chosen; the acceptor follows
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport.base import (
    AcceptorEnd,
    PoolRequest,
    Transport,
    TransportError,
)
from megatron_bpipe.runtime.transport.pair.catalogue import (
    TransportSpec,
    candidates,
    preference,
    spec_named,
)
from megatron_bpipe.runtime.transport.pair.links import DeviceInfo, Link, PairTopology
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous

NONE = "none"  # no transport is open to the pair
MOST_CTAS = 2


@dataclass
class Pair:
    """This rank's end of its pair, after both ends have agreed on a transport.

    Attributes:
        rendezvous: the line to the other end.
        transport: the name of what they have agreed on.
        why: for people: the link, and what was passed over.
        device: where this rank computes.
        group: the pair's process group, for ``p2p``.
        link: between the two GPUs; None on CPUs.
    """

    rendezvous: PairRendezvous
    transport: str
    why: str
    device: torch.device
    group: Any
    link: Link | None = None

    @property
    def spec(self) -> TransportSpec:
        """What the pair has agreed on."""
        return spec_named(self.transport)

    def open_acceptor(self, request: PoolRequest) -> AcceptorEnd:
        """The acceptor's end, with the pool; waits for nobody.

        Raises:
            TransportError: there is no memory for the pool.
        """
        return self.spec.open_acceptor(self, request)

    def open_evictor(self, request: PoolRequest, offer: str) -> Transport:
        """The evictor's end; waits for nobody.

        Args:
            request: what was asked for.
            offer: the acceptor's answer; "" where evicted bytes do not lie there.

        Raises:
            TransportError: there is no memory for what this end needs.
        """
        return self.spec.open_evictor(self, request, offer)


def open_pair(rendezvous: PairRendezvous, asked: str, device: torch.device) -> Pair:
    """Agree on a transport and connect; both ends call it once they have met.

    Args:
        rendezvous: with the other end.
        asked: one of `options.TRANSPORTS`.
        device: where this rank computes.

    Raises:
        TransportError: the partner is gone, or what was asked for is not open to the pair; then
            both ends raise it, with the reason.
    """
    rendezvous.exchange_identity()
    topology = look(rendezvous, device)
    transport, why = agree(asked, topology, rendezvous, device)
    needs_group = spec_named(transport).needs_group
    group = two_sided_group(rendezvous, device) if needs_group else None
    return Pair(rendezvous, transport, why, device, group, topology.link)


def agree(
    asked: str, topology: PairTopology, rendezvous: PairRendezvous, device: torch.device
) -> tuple[str, str]:
    """The transport of a pair and why; both ends call it.

    Raises:
        TransportError: nothing that was asked for is open to the pair; on both ends.
    """
    if rendezvous.end == "acceptor":
        if rendezvous.get("trial"):
            _offer_trial(rendezvous, device)
        transport, _, why = rendezvous.get("transport").partition(" ")
    else:
        transport, why = _choose(asked, topology, rendezvous, device)
        rendezvous.publish("transport", f"{transport} {why}")
    if transport == NONE:
        raise TransportError(f"pair {rendezvous.pair}: --bpipe-transport {asked}, but {why}")
    return transport, why


def two_sided_group(rendezvous: PairRendezvous, device: torch.device) -> Any:
    """A process group of two, evictor 0 and acceptor 1, unknown to torch's registry of groups.

    ``new_group`` would have to be called by every rank of the job, and its variant that need not
    (``use_local_synchronization``) names groups by how many the calling rank is in, which differs
    between a pipeline's ends.
    """
    own = dist.PrefixStore(f"{rendezvous.pair}/group", rendezvous.store)
    timeout = timedelta(seconds=rendezvous.deadline)
    rank = int(rendezvous.end == "acceptor")
    if device.type == "cuda":
        from megatron_bpipe.runtime.transport.cuda.messages import connect

        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        # a receive that is posted early holds its thread blocks until the bytes come: few of them.
        # Two are what NCCL itself starts from for messages over one network card.
        options.config.max_ctas = MOST_CTAS
        group = dist.ProcessGroupNCCL(own, rank, 2, options)
        connect(group, rank, device)
        return group
    return dist.ProcessGroupGloo(own, rank, 2, timeout)


def _choose(
    asked: str, topology: PairTopology, rendezvous: PairRendezvous, device: torch.device
) -> tuple[str, str]:
    """The evictor's choice: what is open, tried where it may be forbidden all the same."""
    order, out = candidates(asked, topology)
    best = order[0] if order else None
    trial = best.name if best is not None and best.trial else ""
    rendezvous.publish("trial", trial)
    if trial:
        failed = _try(rendezvous, device)
        if failed:
            out[trial] = f"CUDA IPC was tried and failed: {failed}"
            del order[0]
    if not order:
        return NONE, "; ".join(out.values())
    link = topology.link.value if topology.link is not None else _of_cpus(topology)
    better = itertools.takewhile(lambda spec: spec is not order[0], preference(asked, topology))
    passed_over = (f"not {spec.name}: {out[spec.name]}" for spec in better)
    return order[0].name, "; ".join([link, *passed_over])


def _try(rendezvous: PairRendezvous, device: torch.device) -> str:
    from megatron_bpipe.runtime.transport.cuda.ipc import try_to_open

    handle, _, failed = rendezvous.get("offer").partition(" ")
    return failed or try_to_open(handle, device)


def _offer_trial(rendezvous: PairRendezvous, device: torch.device) -> None:
    from megatron_bpipe.runtime.transport.cuda.ipc import Trial

    try:
        trial = Trial(device, rendezvous.pair)
    except Exception as error:  # whatever it is, the other end must hear of it and go on
        rendezvous.publish("offer", f" {str(error) or type(error).__name__}")
        return
    rendezvous.publish("offer", f"{trial.handle} ")
    rendezvous.get("transport")  # said when the trial is over: nothing is mapped any more
    trial.close()


def look(rendezvous: PairRendezvous, device: torch.device) -> PairTopology:
    """Say where this rank computes, hear where the other one does, see how they are linked."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        from megatron_bpipe.runtime.transport.cuda.device_info import device_info, link_between
    mine = device_info(device) if on_gpu else DeviceInfo()
    rendezvous.publish("device", mine.dumps())
    theirs = DeviceInfo.loads(rendezvous.get("device"))
    one_host = rendezvous.peer is not None
    link: Link | None = link_between(mine, theirs, one_host) if on_gpu else None
    return PairTopology(mine, theirs, one_host, link)


def _of_cpus(topology: PairTopology) -> str:
    return "one host" if topology.one_host else Link.NODE.value
