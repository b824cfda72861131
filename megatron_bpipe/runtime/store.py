"""The evictor's activation store: carries out E, EW, L and LW, and checks every move.

F3   over: put hooks on its graph, which capture what it saved; choose what leaves
E3   start to copy those blocks to the acceptor
EW3  the copy is over: drop the local blocks
L3   allocate the blocks anew, start to copy them back
LW3  the copy is over: the backward may use them; the slot is free again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_bpipe.runtime.activation import Activation, State
from megatron_bpipe.runtime.block import padded
from megatron_bpipe.runtime.graph import roots_of, saved_storages, tensors_of
from megatron_bpipe.runtime.transport import TransferHandle, Transport
from megatron_bpipe.schedule.ops import ActivationKey


@dataclass
class Totals:
    """Bytes moved since the start."""

    evicted: int = 0
    loaded: int = 0


@dataclass
class ActivationStore:
    """Micro-batches of one iteration that leave this stage.

    Args:
        connect: gives the transport, from the bytes of the largest activation; called once, before
            the first eviction, and may wait for the pool.
        request: told once, when every chunk's first forward is over, the bytes of the largest
            activation and those that may be away at a time (None: as many of the largest).
        pool_of: bytes that may be away at a time, from those of one activation of each chunk.
        chunks: model chunks of this stage.
        keep_local: do everything but drop the local copy (``--bpipe-keep-local``).
        on_load: told which storages a load allocated, for the memory books.
        sizes: bytes that one activation of each chunk may send away, where they are known before
            the first forward; else they are learned from it.
    """

    connect: Callable[[int], Transport]
    request: Callable[[int, int | None], None] = lambda *_: None
    pool_of: Callable[[Mapping[int, Sequence[int]]], int] | None = None
    chunks: int = 1
    keep_local: bool = False
    on_load: Callable[[ActivationKey, list[torch.UntypedStorage]], None] | None = None
    totals: Totals = field(default_factory=Totals)
    transport: Transport | None = None
    sizes: dict[int, int] = field(default_factory=dict)
    _held: dict[ActivationKey, Activation] = field(default_factory=dict)
    _transfers: dict[ActivationKey, TransferHandle] = field(default_factory=dict)

    def measure(self, key: ActivationKey, output: object) -> None:
        """A forward has just ended.

        The first of each chunk shows how large its activations are. When all are known the pool is
        asked for; that is before the first eviction, which comes later than any chunk's start.
        """
        chunk = key.chunk if self.chunks > 1 else 0
        if len(self.sizes) < self.chunks and chunk not in self.sizes:
            self.sizes[chunk] = saved_bytes(output)
            if len(self.sizes) == self.chunks:
                each = {chunk: (size,) for chunk, size in self.sizes.items()}
                total = self.pool_of(each) if self.pool_of is not None else None
                self.request(max(self.sizes.values()), total)

    def capture(self, key: ActivationKey, output: object) -> None:
        """The forward of an activation that will be evicted has just ended.

        Called while a GPU still computes it: at E everything would wait for the host.
        """
        tensors = tensors_of(output)
        device = tensors[0].device if tensors else torch.device("cpu")
        activation = self._held[key] = Activation(key, roots_of(output), device)
        activation.capture()

    def evict(self, key: ActivationKey) -> int:
        """E: start the copy out; returns its bytes, 0 if nothing of it can leave."""
        activation = self._held[key]
        activation.move(State.EVICTING)
        if self.transport is None:
            assert len(self.sizes) == self.chunks, "no chunk evicts before all have started"
            self.transport = self.connect(max(self.sizes.values()))
        pieces = activation.choose_leaving()
        self._transfers[key] = self.transport.evict(key, pieces)
        size = sum(piece.numel() for piece in pieces)
        self.totals.evicted += size
        return size

    def finish_evict(self, key: ActivationKey) -> TransferHandle:
        """EW: wait for the copy, free the local blocks."""
        activation = self._held[key]
        transfer = self._transfers.pop(key)
        transfer.wait()
        activation.move(State.REMOTE)
        if not self.keep_local:
            activation.drop()
        return transfer

    def load(self, key: ActivationKey) -> int:
        """L: start the copy back into fresh memory; returns its bytes."""
        activation = self._held[key]
        activation.move(State.LOADING)
        assert self.transport is not None
        if self.keep_local:
            leaving = activation.leaving
            pieces = [torch.empty(b.size, dtype=torch.uint8, device=b.device) for b in leaving]
        else:
            pieces, storages = activation.allocate()
            if self.on_load is not None:
                self.on_load(key, storages)
        self._transfers[key] = self.transport.load(key, pieces)
        size = sum(piece.numel() for piece in pieces)
        self.totals.loaded += size
        return size

    def finish_load(self, key: ActivationKey) -> TransferHandle:
        """LW: wait for the copy; the slot in the pool is free again."""
        assert self.transport is not None
        transfer = self._transfers.pop(key)
        transfer.wait()
        activation = self._held[key]
        activation.move(State.RESIDENT)
        activation.arrived()
        self.transport.release(key)
        return transfer

    def consume(self, key: ActivationKey) -> None:
        """The backward is over."""
        activation = self._held.pop(key, None)
        if activation is not None:
            activation.move(State.CONSUMED)
            activation.forget()

    def check_empty(self) -> None:
        """After an iteration nothing may be left.

        Raises:
            RuntimeError: with what is left.
        """
        occupied = self.transport.occupied_bytes if self.transport else 0
        if self._held or self._transfers or occupied or self.totals.evicted != self.totals.loaded:
            states = ", ".join(f"{a.key}: {a.state.value!r}" for a in self._held.values())
            raise RuntimeError(
                f"after the iteration micro-batches {{{states}}} are still held, the pool holds "
                f"{occupied} bytes, {self.totals.evicted} bytes went out and "
                f"{self.totals.loaded} came back"
            )

    def close(self) -> None:
        """Let the transport go."""
        if self.transport is not None:
            self.transport.close()
            self.transport = None


def saved_bytes(output: object) -> int:
    """Bytes that one micro-batch may send away, room for alignment included."""
    leaving = (entry for entry in saved_storages(roots_of(output)) if entry.kept is None)
    return sum(padded(entry.storage.nbytes()) for entry in leaving)
