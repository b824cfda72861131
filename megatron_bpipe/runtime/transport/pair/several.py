"""One rank with several pairs: an evictor with several lenders, a lender with several evictors.

Each pair has its own handshake, transport and pool; here they are put together as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_bpipe.runtime.transport.base import AcceptorEnd, TransferHandle, Transport
from megatron_bpipe.runtime.transport.host.own import host_transport
from megatron_bpipe.runtime.transport.pair.handshake import LentPool
from megatron_bpipe.schedule.ops import PartKey


class LentPools:
    """All that one stage lends; see `executor.Acceptor`.

    Args:
        pools: by the stage of the evictor.
    """

    def __init__(self, pools: Mapping[int, LentPool]) -> None:
        self._pools = dict(pools)

    @property
    def early(self) -> bool:
        """See `executor.Acceptor`."""
        return any(pool.early for pool in self._pools.values())

    def of(self, evictor: int | None) -> AcceptorEnd:
        """See `executor.Acceptor`."""
        return next(iter(self._pools.values())) if evictor is None else self._pools[evictor]

    def open(self) -> None:
        """See `executor.Acceptor`."""
        for pool in self._pools.values():
            pool.open()

    def finish(self) -> None:
        """See `AcceptorEnd`."""
        for pool in self._pools.values():
            pool.finish()

    def forget(self) -> None:
        """See `AcceptorEnd`."""
        for pool in self._pools.values():
            pool.forget()

    @property
    def pool_bytes(self) -> int:
        """Bytes lent now."""
        return sum(pool.pool_bytes for pool in self._pools.values())

    @property
    def transport(self) -> str:
        """How they travel; "" before any pair has agreed."""
        return named(pool.transport for pool in self._pools.values())

    @property
    def failure(self) -> BaseException | None:
        """Why some pool is not there, where that is known already."""
        return next((why for why in (p.failure for p in self._pools.values()) if why), None)

    def close(self) -> None:
        """See `AcceptorEnd`."""
        for pool in self._pools.values():
            pool.close()


class RoutedTransport:
    """The evictor's end of several pairs: each part of one goes where the schedule says.

    Args:
        transports: by the stage of the lender.
    """

    def __init__(self, transports: Mapping[int, Transport]) -> None:
        self._transports = dict(transports)
        self._lender_of: Mapping[PartKey, int] = {}

    def follow(self, lender_of: Mapping[PartKey, int]) -> None:
        """An iteration begins; ``lender_of`` has everything that will leave in it."""
        self._lender_of = lender_of

    def evict(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """See `Transport`."""
        return self._of(key).evict(key, pieces)

    def load(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """See `Transport`."""
        return self._of(key).load(key, pieces)

    def release(self, key: PartKey) -> None:
        """See `Transport`."""
        self._of(key).release(key)

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return sum(one.occupied_bytes for one in self._transports.values())

    @property
    def hosted_bytes(self) -> int:
        """See `Transport`."""
        return sum(one.hosted_bytes for one in self._transports.values())

    @property
    def spilled_bytes(self) -> int:
        """See `Transport`."""
        return sum(one.spilled_bytes for one in self._transports.values())

    def close(self) -> None:
        """See `Transport`."""
        for one in self._transports.values():
            one.close()

    def _of(self, key: PartKey) -> Transport:
        return self._transports[self._lender_of[key]]


class OwnPool:
    """A pool in this rank's own host memory, for what no stage has room for; needs nobody.

    Args:
        name: for messages.
        size: bytes.
        device: where activations are computed.
        deadline: seconds that a transfer may take.
    """

    def __init__(self, name: str, size: int, device: torch.device, deadline: float) -> None:
        self._name, self._size, self._device, self._deadline = name, size, device, deadline

    def open(self) -> Transport:
        """Take the memory.

        Raises:
            TransportError: the host has none left.
        """
        return host_transport(self._name, self._size, self._device, self._deadline)

    def close(self) -> None:
        """What was opened is closed by whoever has it."""


def named(transports: Iterable[str]) -> str:
    """Several transports as one text, each once."""
    return ", ".join(sorted({name for name in transports if name}))
