"""How two ranks of a pair are linked. Pure."""

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


def one_machine(*, on_gpu: bool) -> PairTopology:
    """What can be said before a partner is known: both ends alike, on one host."""
    here = DeviceInfo("here", ("here",)) if on_gpu else DeviceInfo()
    return PairTopology(here, here, one_host=True)
