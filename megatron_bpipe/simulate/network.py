"""Links between stages, and what shares them.

Every stage has a port into its node's fabric and one to other nodes, each an outgoing and an
incoming shared link (one for both where ``full_duplex`` is off), and a link to its host's memory.
With ``contention`` the transfers over a shared link share its bandwidth equally; otherwise each has
it alone.

``tp_share`` is the share u of a computation's time that tensor-parallel traffic keeps the
fabric port busy.  While a transfer of that port and a computation overlap both want it, so each
progresses at 1/(1+u) of its speed: the port is busy all the time and does u of the one's work and
1 of the other's in 1 + u seconds.

Units: bytes a second in one direction, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SharedLink = tuple[str, int]


@dataclass(frozen=True)
class Link:
    """One direction of a link."""

    bandwidth: float = math.inf
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(
                f"bandwidth is {self.bandwidth}: give bytes a second, more than 0 (NVLink: 300e9)"
            )
        if self.latency < 0:
            raise ValueError(f"latency is {self.latency}: give seconds, 0 or more (5e-6 is 5 us)")


@dataclass(frozen=True)
class Path:
    """How bytes get from one stage to another: a link, and the shared links they occupy."""

    link: Link
    links: tuple[SharedLink, ...]

    def seconds(self, size: float) -> float:
        """Time for so many bytes alone."""
        return self.link.latency + size / self.link.bandwidth


@dataclass(frozen=True)
class Network:
    """All links; ``nodes`` says on which node each stage runs (empty: all on one)."""

    local: Link = Link()
    remote: Link = Link()
    host: Link = Link()
    nodes: tuple[int, ...] = ()
    full_duplex: bool = True
    contention: bool = False
    tp_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tp_share <= 1:
            raise ValueError(f"tp_share is {self.tp_share}: a share is from 0 to 1")

    @property
    def shared(self) -> bool:
        """Whether speeds depend on what else happens."""
        return self.contention or self.tp_share > 0

    def path(self, source: int, target: int) -> Path:
        """From stage to stage."""
        node = self.nodes
        same = not node or node[source] == node[target]
        return self._path(
            self.local if same else self.remote, "fabric" if same else "net", source, target
        )

    def host_path(self, stage: int, *, out: bool) -> Path:
        """From a stage to its host's memory (out) or back."""
        end = "pcie-out" if out or not self.full_duplex else "pcie-in"
        return Path(self.host, ((end, stage),))

    def _path(self, link: Link, kind: str, source: int, target: int) -> Path:
        if self.full_duplex:
            return Path(link, ((f"{kind}-out", source), (f"{kind}-in", target)))
        return Path(link, ((kind, source), (kind, target)))


FREE = Network()
"""Messages and transfers take no time of their own."""
