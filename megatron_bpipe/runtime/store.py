"""The evictor's activation store: carries out E, EW, L and LW, and checks every move.

F3   over: put hooks on its graph, which capture what it saved; choose what leaves
E3   start to copy those blocks to the acceptor
EW3  the copy is over: drop the local blocks
L3   allocate the blocks anew, start to copy them back
LW3  the copy is over: the backward may use them; the slot is free again

Each of E, EW, L and LW may be about one part of the activation: ``E3/0``.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial

import torch

from megatron_bpipe.runtime.activation import Activation, cut
from megatron_bpipe.runtime.block import padded
from megatron_bpipe.runtime.graph import roots_of, saved_storages, tensors_of
from megatron_bpipe.runtime.part import Part, State
from megatron_bpipe.runtime.torch_internals import sequence_of
from megatron_bpipe.runtime.transport import TransferHandle, Transport
from megatron_bpipe.schedule.ops import ActivationKey, PartKey


@dataclass
class Totals:
    """Bytes moved since the start; ``forgotten``: went out and will never come back."""

    evicted: int = 0
    loaded: int = 0
    forgotten: int = 0


@dataclass(frozen=True)
class Measured:
    """What the first forward of a model chunk showed.

    ``sizes`` are the bytes of each part, ``back`` how far before the graph's end, counted in
    autograd's sequence numbers, each part's last node is: there its backward begins.  ``block`` are
    those of the largest storage.
    """

    sizes: tuple[int, ...]
    back: tuple[int, ...]
    block: int = 0

    @property
    def block_in_parts(self) -> float:
        """The largest storage, in equal parts of the activation."""
        return self.block * len(self.sizes) / max(1, sum(self.sizes))


@dataclass
class ActivationStore:
    """Micro-batches that leave this stage; of one iteration, where each ends with a flush.

    Args:
        connect: gives the transport, from the bytes of the largest activation; called once, before
            the first eviction, and may wait for the pool.
        request: told once, when every chunk's first forward is over, the bytes of the largest
            unit and those that may be away at a time (None: as many of the largest).
        pool_of: bytes that may be away at a time, from those of the parts of one activation of each
            chunk.
        chunks: model chunks of this stage.
        parts: in how many an activation travels.
        keep_local: do everything but drop the local copy (``--bpipe-keep-local``).
        on_load: told which storages a load allocated, for the memory books.
        sizes: bytes that one activation of each chunk may send away, where they are known before
            the first forward; else they are learned from it.
    """

    connect: Callable[[int], Transport]
    request: Callable[[int, int | None], None] = lambda *_: None
    pool_of: Callable[[Mapping[int, Sequence[int]]], int] | None = None
    chunks: int = 1
    parts: int = 1
    keep_local: bool = False
    on_load: Callable[[ActivationKey, list[torch.UntypedStorage]], None] | None = None
    totals: Totals = field(default_factory=Totals)
    transport: Transport | None = None
    sizes: InitVar[Mapping[int, int] | None] = None
    measured: dict[int, Measured] = field(default_factory=dict)  # by chunk
    _fetch: Callable[[PartKey], None] | None = None
    _held: dict[ActivationKey, Activation] = field(default_factory=dict)
    _transfers: dict[tuple[ActivationKey, int], TransferHandle] = field(default_factory=dict)

    def __post_init__(self, sizes: Mapping[int, int] | None) -> None:
        for chunk, size in (sizes or {}).items():
            self.measured[chunk] = Measured((size,), (0,))

    def measure(self, key: ActivationKey, output: object) -> None:
        """A forward has just ended.

        The first of each chunk shows how large its activations are. When all are known the pool is
        asked for; that is before the first eviction, which comes later than any chunk's start.
        """
        chunk = key.chunk if self.chunks > 1 else 0
        if len(self.measured) < self.chunks and chunk not in self.measured:
            self.measured[chunk] = measure(output, self.parts)
            if len(self.measured) == self.chunks:
                each = {chunk: seen.sizes for chunk, seen in self.measured.items()}
                total = self.pool_of(each) if self.pool_of is not None else None
                self.request(max(max(sizes) for sizes in each.values()), total)

    def fetch_by(self, fetch: Callable[[PartKey], None] | None) -> None:
        """Who is to bring a part back that a backward asks for before its LW has come."""
        self._fetch = fetch

    def capture(self, key: ActivationKey, output: object, leaving: Collection[int] = (0,)) -> None:
        """The forward of an activation has just ended of which the parts ``leaving`` will leave.

        Called while a GPU still computes it: at E everything would wait for the host.
        """
        tensors = tensors_of(output)
        device = tensors[0].device if tensors else torch.device("cpu")
        activation = self._held[key] = Activation(key, roots_of(output), device)
        activation.capture(self.back(key) if self.parts > 1 else (0,), leaving)

    def evict(self, key: ActivationKey, part: int = 0) -> int:
        """E: start the copy out; returns its bytes, 0 if nothing of it can leave."""
        one = self._part(key, part)
        one.move(State.EVICTING)
        if self.transport is None:
            assert len(self.measured) == self.chunks, "no chunk evicts before all have started"
            self.transport = self.connect(max(sum(seen.sizes) for seen in self.measured.values()))
        pieces = one.choose_leaving()
        self._transfers[key, part] = self.transport.evict(one.key, pieces)
        size = sum(piece.numel() for piece in pieces)
        self.totals.evicted += size
        return size

    def finish_evict(self, key: ActivationKey, part: int = 0) -> TransferHandle:
        """EW: wait for the copy, free the local blocks."""
        one = self._part(key, part)
        transfer = self._transfers.pop((key, part))
        transfer.wait()
        one.move(State.REMOTE)
        if not self.keep_local:
            one.drop(self._bringing_back(one.key))
        return transfer

    def load(self, key: ActivationKey, part: int = 0) -> int:
        """L: start the copy back into fresh memory; returns its bytes."""
        one = self._part(key, part)
        one.move(State.LOADING)
        assert self.transport is not None
        if self.keep_local:
            pieces = [torch.empty(b.size, dtype=torch.uint8, device=b.device) for b in one.leaving]
        else:
            pieces, storages = one.allocate()
            if self.on_load is not None:
                self.on_load(key, storages)
        self._transfers[key, part] = self.transport.load(one.key, pieces)
        size = sum(piece.numel() for piece in pieces)
        self.totals.loaded += size
        return size

    def finish_load(self, key: ActivationKey, part: int = 0) -> TransferHandle:
        """LW: wait for the copy; the slot in the pool is free again."""
        assert self.transport is not None
        transfer = self._transfers.pop((key, part))
        transfer.wait()
        one = self._part(key, part)
        one.move(State.RESIDENT)
        one.arrived()
        self.transport.release(one.key)
        return transfer

    def consume(self, key: ActivationKey) -> None:
        """The backward is over."""
        activation = self._held.pop(key, None)
        if activation is not None:
            activation.consume()

    def forget(self) -> None:
        """Between iterations: no backward of what is held will ever run."""
        assert not self._transfers, "an iteration ends when its transfers are over"
        for activation in self._held.values():
            for part in activation.parts:
                if part.state is State.REMOTE:
                    assert self.transport is not None
                    self.transport.release(part.key)
        self._held.clear()
        self.totals.forgotten = self.totals.evicted - self.totals.loaded

    def check_empty(self) -> None:
        """After an iteration nothing may be left.

        Raises:
            RuntimeError: with what is left.
        """
        occupied = self.transport.occupied_bytes if self.transport else 0
        totals = self.totals
        still = totals.evicted - totals.loaded - totals.forgotten
        if self._held or self._transfers or occupied or still:
            left = [part for held in self._held.values() for part in held.parts]
            states = ", ".join(f"{part.key}: {part.state.value!r}" for part in left)
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

    def back(self, key: ActivationKey) -> Sequence[int]:
        """Where the parts of an activation end, see `Measured`."""
        return self.measured[key.chunk if self.chunks > 1 else 0].back

    def _part(self, key: ActivationKey, part: int) -> Part:
        return self._held[key].parts[part]

    def _bringing_back(self, key: PartKey) -> Callable[[], None]:
        """What a backward calls that asks for something of this part before it is back.

        Blocks hold it, and a graph of autograd holds them where no garbage collection looks: so it
        must hold neither this store nor the part.
        """
        return partial(self._fetch, key) if self._fetch is not None else lambda: None


def saved_bytes(output: object) -> int:
    """Bytes that one micro-batch may send away, room for alignment included."""
    return sum(measure(output, 1).sizes)


def measure(output: object, parts: int) -> Measured:
    """What one micro-batch may send away, room for alignment included, part by part."""
    roots = roots_of(output)
    entries = [entry for entry in saved_storages(roots) if entry.kept is None]
    entries.sort(key=lambda entry: entry.sequence)
    sizes = [padded(entry.storage.nbytes()) for entry in entries]
    cuts = cut(sizes, parts)
    ends = [0] * parts
    for entry, part in zip(entries, cuts, strict=True):
        ends[part:] = [entry.sequence] * (parts - part)  # entries come in rising order
    totals = [0] * parts
    for entry, size in zip(entries, sizes, strict=True):
        totals[min(parts - 1, bisect.bisect_left(ends, entry.sequence))] += size
    top = max(map(sequence_of, roots), default=0)
    return Measured(tuple(totals), tuple(top - end for end in ends), max(sizes, default=0))
