"""What the activation store asks of a transport.

A transport has two ends. The evictor's `Transport` moves bytes; the acceptor's `AcceptorEnd` holds
the memory. One-sided transports need nothing of the acceptor after the pool is lent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_bpipe.schedule.ops import PartKey


class TransportError(RuntimeError):
    """Bytes could not travel; the message names the pair and what to do."""


@dataclass(frozen=True)
class PoolRequest:
    """What an evictor asks of its acceptor.

    Attributes:
        microbatch_bytes: bytes that one forward saved on the evictor, of the largest model chunk.
        slots: activations that the pool must hold at once.
        total: bytes that the pool must hold at once, where chunks of different sizes make that
            less than ``slots`` of the largest; None: as many.
    """

    microbatch_bytes: int
    slots: int
    total: int | None = None

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool, before a transport rounds them up."""
        return self.microbatch_bytes * self.slots if self.total is None else self.total


class TransferHandle(Protocol):
    """One transfer under way."""

    def wait(self) -> None:
        """Let what is computed from here on come after the transfer; raise what went wrong in it.

        On a CPU the calling thread waits. On CUDA the current stream does, and the thread goes on.
        """

    @property
    def span(self) -> tuple[float, float]:
        """Start and end, seconds on `time.perf_counter`'s clock; read it after `wait`.

        On CUDA reading it waits for the device: leave it until an iteration is over.
        """

    @property
    def exposed(self) -> float:
        """Seconds that the computation stood still in `wait`; to be read like `span`."""


class NothingToMove:
    """The transfer of a micro-batch of which nothing can leave: over before it begins.

    See `TransferHandle`.
    """

    exposed = 0.0

    def __init__(self) -> None:
        now = time.perf_counter()
        self.span = now, now

    def wait(self) -> None:
        """Nothing is under way."""


class Transport(Protocol):
    """The evictor's end. A micro-batch may have no pieces: nothing leaves, 0 bytes move."""

    def evict(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """Start to copy ``pieces`` (flat uint8 tensors) out."""

    def load(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> TransferHandle:
        """Start to copy a micro-batch back into ``pieces``, same order and sizes as evicted."""

    def release(self, key: PartKey) -> None:
        """Give its room in the pool back; call when its load is over."""

    @property
    def occupied_bytes(self) -> int:
        """Bytes of the pool that hold something now."""

    @property
    def hosted_bytes(self) -> int:
        """Bytes of this process's own host memory that the transport keeps for activations."""

    @property
    def spilled_bytes(self) -> int:
        """Bytes evicted since the start that found no room in the pool the partner had lent."""

    def close(self) -> None:
        """Stop threads and unmap memory."""


class AcceptorEnd(Protocol):
    """The acceptor's end; making it allocates the pool and waits for nobody.

    Attributes:
        offer: text by which the evictor opens its end; "" where it needs none.
    """

    offer: str

    @property
    def pool_bytes(self) -> int:
        """Bytes lent now."""

    def accept(self, key: PartKey) -> None:
        """AC: be ready for an evicted micro-batch; returns at once."""

    def give_back(self, key: PartKey) -> None:
        """RT: send it back; returns at once."""

    def finish(self) -> None:
        """Raise unless every transfer of the iteration is over and nothing is left."""

    def forget(self) -> None:
        """What is kept here will never be asked for; between iterations, on both ends."""

    def close(self) -> None:
        """Free the pool."""
