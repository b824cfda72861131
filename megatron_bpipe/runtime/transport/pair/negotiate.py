"""Choose a pair's transport and open both of its ends.

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

from megatron_bpipe.runtime.transport import AcceptorEnd, Transport, TransportError
from megatron_bpipe.runtime.transport.host import NoPool, host_transport
from megatron_bpipe.runtime.transport.pair.links import (
    DeviceInfo,
    Link,
    PairTopology,
    candidates,
    preference,
)
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.runtime.transport.shared_memory import (
    SharedMemoryAcceptor,
    shared_memory_transport,
)
from megatron_bpipe.runtime.transport.two_sided import TwoSidedAcceptor, TwoSidedTransport

NONE = "none"  # no transport is open to the pair


@dataclass
class Pair:
    """This rank's end of its pair, after both ends have agreed on a transport.

    Attributes:
        rendezvous: the line to the other end.
        transport: ``ipc``, ``shm``, ``p2p`` or ``host``.
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

    def open_evictor(self, microbatch_bytes: int, slots: int) -> Transport:
        """The evictor's end."""
        rendezvous, wanted = self.rendezvous, microbatch_bytes * slots
        if self.transport == "shm":
            return shared_memory_transport(rendezvous, wanted)
        if self.transport == "host":
            return host_transport(rendezvous.pair, wanted, self.device, rendezvous.deadline)
        if self.transport == "ipc":
            from megatron_bpipe.runtime.transport.cuda.ipc import ipc_transport

            return ipc_transport(rendezvous, wanted, self.device)
        if self.device.type == "cuda":
            from megatron_bpipe.runtime.transport.cuda.messages import NcclTransport

            return NcclTransport(self.group, rendezvous, microbatch_bytes, slots, self.device)
        return TwoSidedTransport(self.group, rendezvous.pair, rendezvous.deadline)

    def open_acceptor(self) -> AcceptorEnd:
        """The acceptor's end."""
        rendezvous = self.rendezvous
        if self.transport == "shm":
            return SharedMemoryAcceptor(rendezvous)
        if self.transport == "host":
            return NoPool()
        if self.transport == "ipc":
            from megatron_bpipe.runtime.transport.cuda.ipc import IpcAcceptor

            return IpcAcceptor(rendezvous, self.device)
        if self.device.type == "cuda":
            from megatron_bpipe.runtime.transport.cuda.messages import NcclAcceptor

            return NcclAcceptor(self.group, rendezvous, self.device)
        return TwoSidedAcceptor(self.group, rendezvous.pair, self.device, rendezvous.deadline)


def open_pair(group: Any, evictor: int, asked: str, device: torch.device, deadline: float) -> Pair:
    """Meet the partner and agree; both ends call it at their first iteration.

    Args:
        group: the pipeline's process group.
        evictor: stage of the pair's evictor.
        asked: one of `options.TRANSPORTS`.
        device: where this rank computes.
        deadline: seconds that any wait may take.

    Raises:
        TransportError: the partner does not come, or what was asked for is not open to the pair;
            then both ends raise it, with the reason.
    """
    stages = (evictor, group.size() - 1 - evictor)
    ranks = [dist.get_global_rank(group, stage) for stage in stages]
    end = "evictor" if group.rank() == evictor else "acceptor"
    pair = f"{ranks[0]}-{ranks[1]}"
    store = _store(pair, end, deadline)
    rendezvous = PairRendezvous(store, pair, end, deadline)
    rendezvous.exchange_identity()
    topology = _look(rendezvous, device)
    transport, why = agree(asked, topology, rendezvous, device)
    messages = None
    if transport == "p2p":
        messages = two_sided_group(store, pair, int(end == "acceptor"), device, deadline)
    return Pair(rendezvous, transport, why, device, messages, topology.link)


def agree(
    asked: str, topology: PairTopology, rendezvous: PairRendezvous, device: torch.device
) -> tuple[str, str]:
    """The transport of a pair and why; both ends call it.

    Raises:
        TransportError: nothing that was asked for is open to the pair; on both ends.
    """
    if rendezvous.end == "acceptor":
        if rendezvous.get("trial") == "ipc":
            _offer_trial(rendezvous, device)
        transport, _, why = rendezvous.get("transport").partition(" ")
    else:
        transport, why = _choose(asked, topology, rendezvous, device)
        rendezvous.publish("transport", f"{transport} {why}")
    if transport == NONE:
        raise TransportError(f"pair {rendezvous.pair}: --bpipe-transport {asked}, but {why}")
    return transport, why


def two_sided_group(store: Any, pair: str, rank: int, device: torch.device, deadline: float) -> Any:
    """A process group of two, evictor 0 and acceptor 1, unknown to torch's registry of groups.

    ``new_group`` would have to be called by every rank of the job, and its variant that need not
    (``use_local_synchronization``) names groups by how many the calling rank is in, which differs
    between a pipeline's ends.
    """
    own = dist.PrefixStore(f"{pair}/group", store)
    timeout = timedelta(seconds=deadline)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(own, rank, 2, options)
    return dist.ProcessGroupGloo(own, rank, 2, timeout)


def _choose(
    asked: str, topology: PairTopology, rendezvous: PairRendezvous, device: torch.device
) -> tuple[str, str]:
    """The evictor's choice: what is open, tried where it may be forbidden all the same."""
    order, out = candidates(asked, topology)
    trial = order[:1] == ["ipc"]
    rendezvous.publish("trial", "ipc" if trial else "")
    if trial:
        failed = _try(rendezvous, device)
        if failed:
            out["ipc"] = f"CUDA IPC was tried and failed: {failed}"
            order.remove("ipc")
    if not order:
        return NONE, "; ".join(out.values())
    link = topology.link.value if topology.link is not None else _of_cpus(topology)
    better = itertools.takewhile(lambda name: name != order[0], preference(asked, topology))
    return order[0], "; ".join([link, *(f"not {name}: {out[name]}" for name in better)])


def _try(rendezvous: PairRendezvous, device: torch.device) -> str:
    from megatron_bpipe.runtime.transport.cuda.ipc import try_to_open

    handle, _, failed = rendezvous.get("offer").partition(" ")
    return failed or try_to_open(handle, device)


def _offer_trial(rendezvous: PairRendezvous, device: torch.device) -> None:
    from megatron_bpipe.runtime.transport.cuda.driver import DriverError
    from megatron_bpipe.runtime.transport.cuda.ipc import Trial

    try:
        trial = Trial(device, rendezvous.pair)
    except (DriverError, TransportError) as error:
        rendezvous.publish("offer", f" {error}")
        return
    rendezvous.publish("offer", f"{trial.handle} ")
    rendezvous.get("transport")  # said when the trial is over: nothing is mapped any more
    trial.close()


def _look(rendezvous: PairRendezvous, device: torch.device) -> PairTopology:
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


def _store(pair: str, end: str, deadline: float) -> Any:
    """The job's store, in a corner that no earlier rendezvous of this pair has written to."""
    base: Any = dist.distributed_c10d._get_default_store()
    # its own connection: a wait here must not hold up c10d's own requests
    store = dist.PrefixStore("megatron_bpipe", base.clone())
    store.set_timeout(timedelta(seconds=deadline))
    times_met = store.add(f"{pair}/{end}/times", 1)
    return dist.PrefixStore(str(times_met), store)
