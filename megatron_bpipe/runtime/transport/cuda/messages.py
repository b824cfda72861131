"""The two-sided transport over NCCL, for pairs on two nodes. No thread: all is queued on streams.

    evictor                                   acceptor
    E3   pack a chunk, send, ... (copies)  -> AC3  receive each chunk into a slot
    L3   receive a chunk, unpack, ...      <- RT3  send the slot, chunk by chunk

Every message is one slot long, cut into chunks, so the acceptor needs to know no sizes and waits
for nothing. What a larger micro-batch has beyond its slot goes to the evictor's pinned host memory.

The communicator is the pair's own. Deadlock-free: both ends queue the pair's messages in the
order that the validator has run under rendezvous semantics, and on either device whatever a stream
waits for was queued earlier, so even one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) gets to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_bpipe.runtime.block import padded
from megatron_bpipe.runtime.torch_internals import leave
from megatron_bpipe.runtime.transport.base import PoolRequest, TransportError
from megatron_bpipe.runtime.transport.chunks import Placed, chunks, divide, overlaps
from megatron_bpipe.runtime.transport.copies import Part
from megatron_bpipe.runtime.transport.cuda.driver import Copy
from megatron_bpipe.runtime.transport.cuda.streams import (
    StreamCopies,
    StreamTransferHandle,
    addresses,
    copy_stream,
)
from megatron_bpipe.runtime.transport.host.own import HostMemory
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.schedule.ops import PartKey

CHUNK = 32 * 2**20
STAGES = 2  # chunks packed ahead of the one that is sent
EVICTOR, ACCEPTOR, TAG = 0, 1, 0


def connect(group: Any, rank: int, device: torch.device) -> None:
    """Build the communicator, by the first message; both ends call it, neither on the thread that
    computes.

    Args:
        group: a process group of this pair, evictor 0 and acceptor 1.
        rank: this end's.
        device: where this rank computes.
    """
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    message, other = (group.send, ACCEPTOR) if rank == EVICTOR else (group.recv, EVICTOR)
    _wait(message([byte], other, TAG))


class NcclTransport:
    """The evictor's end; see `Transport`.

    Args:
        group: a process group of this pair, evictor 0 and acceptor 1.
        pair: the pair's name, for messages.
        request: what was asked for.
        device: where this rank computes.
    """

    def __init__(self, group: Any, pair: str, request: PoolRequest, device: torch.device) -> None:
        self._group, self._slot = group, _slot(request)
        self._copies = StreamCopies(device)
        shape = (STAGES, min(CHUNK, self._slot))
        self._staging = torch.empty(shape, dtype=torch.uint8, device=device)
        self._sending: list[Any] = [None] * STAGES
        self._spill = OneSidedTransport(pair, HostMemory(pair, 0, device), self._copies)
        self._spilled: dict[PartKey, int] = {}
        self._spilled_bytes = 0

    def evict(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> StreamTransferHandle:
        """See `Transport`."""
        fitting, rest = divide(pieces, self._slot)
        start = self._copies.begin()
        stream = self._copies.stream
        for i, (low, high) in enumerate(chunks(self._slot, CHUNK)):
            chunk = self._staging[i % STAGES]
            with torch.cuda.stream(stream):
                if self._sending[i % STAGES] is not None:
                    self._sending[i % STAGES].wait()  # the stream waits, not the host
                self._copies.copy(_packing(chunk, overlaps(fitting, low, high), out=True))
                request = self._group.send([chunk[: high - low]], ACCEPTOR, TAG)
            self._sending[i % STAGES] = request
        with torch.cuda.stream(stream):
            for request in self._sending:
                _wait(request)
        self._sending = [None] * STAGES
        self._spilled[key] = sum(piece.numel() for piece in rest)
        self._spilled_bytes += self._spilled[key]
        if rest:
            self._spill.evict(key, rest)
        return self._copies.end(start, pieces)

    def load(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> StreamTransferHandle:
        """See `Transport`."""
        fitting, rest = divide(pieces, self._slot)
        start = self._copies.begin()
        spans = chunks(self._slot, CHUNK)
        coming = [self._receive(i, *span) for i, span in enumerate(spans[:STAGES])]
        for i, (low, high) in enumerate(spans):
            with torch.cuda.stream(self._copies.stream):
                _wait(coming[i])
            chunk = self._staging[i % STAGES]
            self._copies.copy(_packing(chunk, overlaps(fitting, low, high), out=False))
            if i + STAGES < len(spans):  # into what was just unpacked
                coming.append(self._receive(i + STAGES, *spans[i + STAGES]))
        if rest:
            self._spill.load(key, rest)
        return self._copies.end(start, pieces)

    def _receive(self, i: int, low: int, high: int) -> Any:
        with torch.cuda.stream(self._copies.stream):
            return self._group.recv([self._staging[i % STAGES][: high - low]], ACCEPTOR, TAG)

    def release(self, key: PartKey) -> None:
        """See `Transport`; the acceptor's slot was free when it had sent it back."""
        if self._spilled.pop(key):
            self._spill.release(key)

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return self._slot * len(self._spilled) + self._spill.occupied_bytes

    @property
    def spilled_bytes(self) -> int:
        """See `Transport`."""
        return self._spilled_bytes

    @property
    def hosted_bytes(self) -> int:
        """See `Transport`."""
        return self._spill.hosted_bytes

    def close(self) -> None:
        """See `Transport`; leaves the group, which torch does not know of."""
        self._spill.close()  # waits for the stream
        leave(self._group)


class NcclAcceptor:
    """The acceptor's end; see `AcceptorEnd`. Slots are allocated once and used again.

    Arguments as for `NcclTransport`.

    Raises:
        TransportError: the GPU has no room for the slots.
    """

    offer = ""

    def __init__(self, group: Any, pair: str, request: PoolRequest, device: torch.device) -> None:
        self._size, slots = _slot(request), request.slots
        self._group, self._pair, self._device = group, pair, device
        self._stream = copy_stream(device)
        self._slots: list[torch.Tensor] = []
        for _ in range(slots):
            self._add_slot()
        self._free = list(range(slots))
        self._held: dict[PartKey, int] = {}
        self._under_way: dict[int, list[Any]] = {}  # messages by slot

    @property
    def pool_bytes(self) -> int:
        """Bytes lent."""
        return self._size * len(self._slots)

    def accept(self, key: PartKey) -> None:
        """AC: queue the receives; on one communicator they come after earlier sends."""
        if not self._free:  # a later iteration with more micro-batches
            self._add_slot()
            self._free.append(len(self._slots) - 1)
        index = self._held[key] = self._free.pop()
        self._wait_for(index)  # what was sent from here
        self._under_way[index] = self._each_chunk(self._group.recv, index)

    def give_back(self, key: PartKey) -> None:
        """RT: queue the sends."""
        index = self._held.pop(key)
        self._wait_for(index)
        self._under_way[index] = self._each_chunk(self._group.send, index)
        self._free.append(index)

    def _each_chunk(self, message: Callable[..., Any], index: int) -> list[Any]:
        slot = self._slots[index]
        with torch.cuda.stream(self._stream):
            return [
                message([slot[low:high]], EVICTOR, TAG) for low, high in chunks(self._size, CHUNK)
            ]

    def _wait_for(self, index: int) -> None:
        """A slot's messages, as late as possible: with one hardware queue a wait holds up all."""
        with torch.cuda.stream(self._stream):
            for request in self._under_way.pop(index, ()):
                _wait(request)

    def finish(self) -> None:
        """See `AcceptorEnd`; NCCL's watchdog ends a job whose messages do not get through."""
        if self._held:
            raise TransportError(f"pair {self._pair}: micro-batches {sorted(self._held)} are left")

    def forget(self) -> None:
        """See `AcceptorEnd`."""
        self._free += self._held.values()
        self._held.clear()

    def close(self) -> None:
        """Free the slots, leave the group."""
        for index in list(self._under_way):
            self._wait_for(index)
        self._stream.synchronize()
        self._slots.clear()
        leave(self._group)

    def _add_slot(self) -> None:
        try:
            slot = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(self._device)
            raise TransportError(
                f"pair {self._pair}: no room for {len(self._slots) + 1} slots of {self._size} "
                f"bytes on the acceptor's GPU, where {free} bytes are free; use a larger "
                "--bpipe-budget or a smaller micro-batch"
            ) from error
        # from here on it is used on that stream alone
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._slots.append(slot)


def _slot(request: PoolRequest) -> int:
    """Bytes of one message: what a micro-batch of usual size needs."""
    return max(padded(request.microbatch_bytes), padded(1))


def _packing(chunk: torch.Tensor, placed: Sequence[Placed], *, out: bool) -> list[Copy]:
    """Copies between pieces and their places in a staging chunk."""
    parts = [Part(chunk, at, piece, 0, piece.numel()) for piece, at in placed]
    return addresses(parts, out=out)


def _wait(request: Any) -> None:
    """Make the current stream wait for a message."""
    if request is not None:
        request.wait()
