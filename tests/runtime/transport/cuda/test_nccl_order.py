"""Chunks of messages under NCCL's rules, both ends in one process on streams that run late.

The group here follows what NCCL does on one communicator: messages of both directions on one
stream, each ordered after the stream that was current when it was queued; ``wait`` makes the
current stream wait. A staging chunk that is used again too early carries wrong bytes.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_bpipe.runtime.transport import PoolRequest
from megatron_bpipe.runtime.transport.cuda import messages
from tests.harness.stand_in_gpu import NEEDS_COMPILER, simulated_gpu, streams

pytestmark = NEEDS_COMPILER
CPU = torch.device("cpu")
Line = queue.SimpleQueue[torch.Tensor]


class Work:
    def __init__(self, event: streams.Event) -> None:
        self._event = event

    def wait(self) -> None:
        streams.current_stream().wait_event(self._event)


class Group:
    """One rank's end of a communicator of two."""

    def __init__(self, out: Line, come: Line) -> None:
        self._out, self._come = out, come
        self.stream = streams.Stream()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._queue(lambda: self._out.put(tensors[0].clone()))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._queue(lambda: tensors[0].copy_(self._come.get_nowait()))

    def shutdown(self) -> None:
        pass

    def _queue(self, work: Callable[[], object]) -> Work:
        self.stream.wait_event(streams.current_stream().record_event())
        self.stream.put(lambda: (work(), None)[1])
        return Work(self.stream.record_event())


def exchange(seed: int, slot: int, beyond: int = 0) -> bool:
    """Micro-batches out and back in random order; whether all bytes were right, none left."""
    dice, right = random.Random(seed), True
    there, back = queue.SimpleQueue(), queue.SimpleQueue()
    evictor, acceptor = Group(there, back), Group(back, there)
    request = PoolRequest(slot, 2)
    transport = messages.NcclTransport(evictor, "0-1", request, CPU)
    acceptor_end = messages.NcclAcceptor(acceptor, "0-1", request, CPU)
    held: dict[int, list[torch.Tensor]] = {}

    def come_back(i: int) -> bool:
        expected = held.pop(i)
        acceptor_end.give_back(i)
        acceptor.stream.synchronize()
        found = [torch.zeros_like(piece) for piece in expected]
        transport.load(i, found).wait()
        transport.release(i)
        return all(map(torch.equal, found, expected))

    for i in range(40):
        if len(held) >= 3 or (held and dice.random() < 0.5):
            right &= come_back(dice.choice(list(held)))
        sizes = [dice.randrange(1, slot // 2 + beyond) for _ in range(3)]
        leaving = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
        held[i] = [piece.clone() for piece in leaving]
        acceptor_end.accept(i)
        transport.evict(i, leaving).wait()
        for piece in leaving:
            piece.fill_(7)  # as if its memory went to other work
        if dice.random() < 0.7:  # the other end is ahead, or not
            acceptor.stream.synchronize()
    while held:
        right &= come_back(next(iter(held)))
    acceptor_end.finish()
    transport.close()
    acceptor_end.close()
    return right and not evictor.stream.queued() and not acceptor.stream.queued()


@pytest.mark.parametrize(
    ("chunk", "slot", "beyond"),
    [(1024, 8192, 0), (1024, 5120, 0), (512, 512, 0), (1024, 1536, 900)],
)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_arrive_in_place(
    monkeypatch: pytest.MonkeyPatch, chunk: int, slot: int, beyond: int, seed: int
) -> None:
    monkeypatch.setattr(messages, "CHUNK", chunk)
    with simulated_gpu():
        assert exchange(seed, slot, beyond)


def test_a_chunk_that_is_used_again_too_early_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "CHUNK", 1024)
    stock = messages.NcclTransport._receive

    def not_waited_for(self: Any, i: int, low: int, high: int) -> None:
        stock(self, i, low, high)

    monkeypatch.setattr(messages.NcclTransport, "_receive", not_waited_for)
    with simulated_gpu():
        assert not exchange(0, 8192)
