"""How two ranks of a pair are linked, and from that which transports are open to them. Pure."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass


class Link(enum.Enum):
    """The best path between two ranks' memories."""

    SAME_GPU = "one GPU"
    NVLINK = "NVLink"
    PCIE = "PCIe, peer access"
    PEER = "peer access, NVLink or PCIe unknown"
    HOST = "one host, no peer access"
    NODE = "two hosts"


@dataclass(frozen=True)
class DeviceInfo:
    """Where a rank computes.

    Attributes:
        uuid: of its GPU; "" on a CPU.
        visible: uuids of all GPUs that its process sees, by its own numbering.
    """

    uuid: str = ""
    visible: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return bool(self.uuid)

    def dumps(self) -> str:
        """As text, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> DeviceInfo:
        """What `dumps` wrote."""
        found = json.loads(text)
        return cls(found["uuid"], tuple(found["visible"]))


def plain_uuid(text: str) -> str:
    """A GPU's uuid without the prefix that some tools put before it."""
    return text.strip().removeprefix("GPU-")


@dataclass(frozen=True)
class PairTopology:
    """What one end of a pair knows about both.

    Attributes:
        mine: where this rank computes.
        theirs: where the other one does.
        one_host: both run on one host and see each other's processes.
        link: how the GPUs are linked; None on CPUs.
    """

    mine: DeviceInfo
    theirs: DeviceInfo
    one_host: bool
    link: Link | None = None


ORDER = {True: ("ipc", "host", "p2p"), False: ("shm", "p2p")}  # by DeviceInfo.on_gpu


def obstacle(transport: str, topology: PairTopology) -> str:
    """What keeps a pair from using ``transport``, with the remedy; "" if nothing does."""
    on_gpu = topology.mine.on_gpu
    if transport == "host":
        return ""
    if transport == "shm":
        if on_gpu:
            return "it is for ranks that compute on CPUs; host is the same for GPUs"
        if not topology.one_host:
            return (
                "its ranks share no host (or no PID namespace); place pairs on one node, or use p2p"
            )
        return ""
    if transport == "p2p":
        same = on_gpu and topology.link is Link.SAME_GPU
        return "NCCL refuses two ranks on one GPU; use ipc or host" if same else ""
    if not on_gpu:
        return "it is for GPUs; use shm"
    if not topology.one_host:
        return "its ranks are on two hosts; place pairs on one node, or use p2p"
    if topology.link is Link.HOST:
        return "the GPUs have no peer access to each other; use host"
    return ""


def preference(asked: str, topology: PairTopology) -> list[str]:
    """Transports to look at, best first.

    Args:
        asked: a transport, or ``auto``.
        topology: of the evictor.
    """
    if asked != "auto":
        return [asked]
    if topology.mine.on_gpu and not topology.one_host:
        return ["p2p", "host"]  # the network before the host's memory: that is for both ends
    return list(ORDER[topology.mine.on_gpu])


def candidates(asked: str, topology: PairTopology) -> tuple[list[str], dict[str, str]]:
    """Transports to try, best first; and why the others are out. Arguments as for `preference`."""
    order = preference(asked, topology)
    out = {name: why for name in order if (why := obstacle(name, topology))}
    return [name for name in order if name not in out], out
