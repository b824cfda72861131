"""The transports there are, one specification each.

Everything that depends on a transport's name follows from here: what ``--bpipe-transport`` takes
and says in its help, what ``auto`` tries, how both ends are opened, what the doctor looks at, and
what bandwidth is expected. A name that is not here is an error wherever it comes up.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_bpipe.runtime.transport.base import (
    AcceptorEnd,
    PoolRequest,
    Transport,
    TransportError,
)
from megatron_bpipe.runtime.transport.pair import openers, probes
from megatron_bpipe.runtime.transport.pair.links import Link, PairTopology

if TYPE_CHECKING:
    from megatron_bpipe.runtime.transport.pair.negotiate import Pair

AUTO = "auto"


class Route(enum.Enum):
    """What a copy crosses: its slowest part decides."""

    GPU_MEMORY = "the GPU's own memory"
    NVLINK = "NVLink"
    HOST_LINK = "the link to the host"
    NETWORK = "the network"


@dataclass(frozen=True)
class TransportSpec:
    """One transport.

    Attributes:
        name: as ``--bpipe-transport`` takes it.
        summary: where bytes lie, for its help.
        obstacle: what keeps a pair from using it, with the remedy; "" if nothing does.
        route: what a copy crosses, by the link of the pair's GPUs.
        open_evictor: opens the evictor's end, given the acceptor's offer.
        open_acceptor: opens the acceptor's end, with the pool.
        probe: what stands in the way on this machine, whoever the partner is; "" if nothing.
        remedy: against that.
        lends: evicted bytes lie on the acceptor.
        trial: whether it works is found out by trying, when both ends meet.
        one_ended: a copy needs nothing of the other end, so that it can be timed alone.
        needs_group: it needs a process group of the pair.
        needed: a machine where it is not open cannot run BPipe at all.
    """

    name: str
    summary: str
    obstacle: Callable[[PairTopology], str]
    route: Callable[[Link | None], Route]
    open_evictor: Callable[[Pair, PoolRequest, str], Transport]
    open_acceptor: Callable[[Pair, PoolRequest], AcceptorEnd]
    probe: Callable[[], str]
    remedy: str
    lends: bool = True
    trial: bool = False
    one_ended: bool = True
    needs_group: bool = False
    needed: bool = False


def _ipc_obstacle(topology: PairTopology) -> str:
    if not topology.mine.on_gpu:
        return "it is for GPUs; use shm"
    if not topology.one_host:
        return "its ranks are on two hosts; place pairs on one node, or use p2p"
    if topology.link is Link.HOST:
        return "the GPUs have no peer access to each other; use host"
    return ""  # GPUs that CUDA_VISIBLE_DEVICES hides too, from CUDA 10.1 on: the trial decides


def _shm_obstacle(topology: PairTopology) -> str:
    if topology.mine.on_gpu:
        return "it is for ranks that compute on CPUs; host is the same for GPUs"
    if not topology.one_host:
        return "its ranks share no host (or no PID namespace); place pairs on one node, or use p2p"
    return ""


def _p2p_obstacle(topology: PairTopology) -> str:
    same = topology.mine.on_gpu and topology.link is Link.SAME_GPU
    return "NCCL refuses two ranks on one GPU; use ipc or host" if same else ""


def _between_gpus(link: Link | None) -> Route:
    routes = {
        Link.SAME_GPU: Route.GPU_MEMORY,
        Link.NVLINK: Route.NVLINK,
        Link.NODE: Route.NETWORK,
    }
    return routes.get(link, Route.HOST_LINK) if link is not None else Route.HOST_LINK


IPC = TransportSpec(
    name="ipc",
    summary="memory of the paired rank's GPU",
    obstacle=_ipc_obstacle,
    route=_between_gpus,
    open_evictor=openers.ipc_evictor,
    open_acceptor=openers.ipc_acceptor,
    probe=probes.ipc,
    remedy="containers need --ipc=host; --bpipe-transport host does without",
    trial=True,
)
SHM = TransportSpec(
    name="shm",
    summary="(CPU ranks) host memory that the paired rank lends",
    obstacle=_shm_obstacle,
    route=lambda link: Route.HOST_LINK,
    open_evictor=openers.shm_evictor,
    open_acceptor=openers.shm_acceptor,
    probe=probes.shm,
    remedy="partners must see each other's /proc: one user, one PID namespace; or take p2p",
)
P2P = TransportSpec(
    name="p2p",
    summary="messages over a process group of the pair (NCCL or gloo)",
    obstacle=_p2p_obstacle,
    route=_between_gpus,
    open_evictor=openers.p2p_evictor,
    open_acceptor=openers.p2p_acceptor,
    probe=probes.p2p,
    remedy="use a torch build with this backend",
    one_ended=False,
    needs_group=True,
    needed=True,
)
HOST = TransportSpec(
    name="host",
    summary="the evicting rank's own host memory",
    obstacle=lambda topology: "",
    route=lambda link: Route.HOST_LINK,
    open_evictor=openers.host_evictor,
    open_acceptor=openers.host_acceptor,
    probe=probes.host,
    remedy="free some, or raise the container's limit",
    lends=False,
)
SPECS = {spec.name: spec for spec in (IPC, SHM, P2P, HOST)}


def spec_named(name: str) -> TransportSpec:
    """The transport of this name.

    Raises:
        TransportError: there is none; with those that exist.
    """
    if name not in SPECS:
        raise TransportError(f"transport {name!r} is unknown: use {', '.join(SPECS)}")
    return SPECS[name]


def preference(asked: str, topology: PairTopology) -> list[TransportSpec]:
    """Transports to look at, best first.

    Args:
        asked: a transport's name, or ``auto``.
        topology: of the evictor.

    Raises:
        TransportError: there is no transport of this name.
    """
    if asked != AUTO:
        return [spec_named(asked)]
    if not topology.mine.on_gpu:
        return [SHM, P2P]
    if not topology.one_host:
        return [P2P, HOST]  # the network before the host's memory: that is for both ends
    return [IPC, HOST, P2P]


def candidates(asked: str, topology: PairTopology) -> tuple[list[TransportSpec], dict[str, str]]:
    """Transports to try, best first; and why the others are out. Arguments as for `preference`."""
    order = preference(asked, topology)
    out = {spec.name: why for spec in order if (why := spec.obstacle(topology))}
    return [spec for spec in order if spec.name not in out], out
