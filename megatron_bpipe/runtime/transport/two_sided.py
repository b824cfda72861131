"""The two-sided transport: messages over a process group of the pair's own.

For pairs that share no memory. Both ends keep one worker thread that does its jobs in order; the
schedule has E and L on the evictor in the same order as AC and RT on the acceptor, so the workers
meet job by job and the computing threads never wait but at EW and LW.

    evictor                     acceptor
    E3: sizes, pieces     ->    AC3: sizes, memory for them, pieces
    L3: pieces            <-    RT3: pieces, memory freed for the next

The group is not the pipeline's: the middle pair are neighbours and partners at once, and gloo
matches messages by sender and order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_bpipe.runtime.transport.base import TransportError
from megatron_bpipe.runtime.transport.worker import Job, Worker
from megatron_bpipe.schedule.ops import PartKey

MOST_PIECES = 4096
EVICTOR, ACCEPTOR = 0, 1  # ranks in the pair's group
TAG = 0


class TwoSidedTransport:
    """The evictor's end; see `Transport`.

    Args:
        group: a process group of this pair, evictor 0 and acceptor 1.
        pair: the pair's name, for messages.
        deadline: seconds any one transfer may take.
    """

    def __init__(self, group: Any, pair: str, deadline: float) -> None:
        self._group, self._pair = group, pair
        self._worker = Worker(deadline)
        self._sizes: dict[PartKey, int] = {}

    def evict(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> Job:
        """See `Transport`."""
        pieces = list(pieces)
        if len(pieces) > MOST_PIECES:
            raise TransportError(
                f"pair {self._pair}: micro-batch {key} has {len(pieces)} storages, "
                f"more than the {MOST_PIECES} that one message header can name"
            )
        self._sizes[key] = sum(p.numel() for p in pieces)

        def send() -> None:
            header = torch.zeros(MOST_PIECES + 1, dtype=torch.int64)
            header[0] = len(pieces)
            header[1 : len(pieces) + 1] = torch.tensor([p.numel() for p in pieces])
            _wait([self._group.send([t], ACCEPTOR, TAG) for t in (header, *pieces)])

        return self._worker.start(f"E{key} to {self._pair}", send)

    def load(self, key: PartKey, pieces: Sequence[torch.Tensor]) -> Job:
        """See `Transport`."""
        pieces = list(pieces)

        def receive() -> None:
            _wait([self._group.recv([p], ACCEPTOR, TAG) for p in pieces])

        return self._worker.start(f"L{key} from {self._pair}", receive)

    def release(self, key: PartKey) -> None:
        """See `Transport`; the acceptor freed the memory when it had sent it back."""
        del self._sizes[key]

    @property
    def occupied_bytes(self) -> int:
        """See `Transport`."""
        return sum(self._sizes.values())

    @property
    def hosted_bytes(self) -> int:
        """See `Transport`: the memory is the acceptor's."""
        return 0

    @property
    def spilled_bytes(self) -> int:
        """See `Transport`: the acceptor takes whatever comes."""
        return 0

    def close(self) -> None:
        """See `Transport`."""
        self._worker.close()


class TwoSidedAcceptor:
    """The acceptor's end; see `AcceptorEnd`.

    Memory is kept between transfers and used again for one that is not larger.
    """

    offer = ""

    def __init__(self, group: Any, pair: str, device: torch.device, deadline: float) -> None:
        self._group, self._pair = group, pair
        self._device = device
        self._worker = Worker(deadline)
        self._free: list[torch.Tensor] = []
        self._held: dict[PartKey, list[torch.Tensor]] = {}
        self._memory: dict[PartKey, torch.Tensor] = {}
        self._jobs: list[Job] = []

    @property
    def pool_bytes(self) -> int:
        """All memory that lies here for the partner."""
        return sum(m.numel() for m in [*self._free, *self._memory.values()])

    def accept(self, key: PartKey) -> None:
        """AC: be ready for an evicted micro-batch."""

        def receive() -> None:
            header = torch.zeros(MOST_PIECES + 1, dtype=torch.int64)
            _wait([self._group.recv([header], EVICTOR, TAG)])
            sizes = header[1 : int(header[0]) + 1].tolist()
            memory = self._room(sum(sizes))
            self._memory[key] = memory
            self._held[key] = list(memory[: sum(sizes)].split(sizes))
            _wait([self._group.recv([p], EVICTOR, TAG) for p in self._held[key]])

        self._start(f"AC{key} of {self._pair}", receive)

    def give_back(self, key: PartKey) -> None:
        """RT: send it back."""

        def send() -> None:
            _wait([self._group.send([p], EVICTOR, TAG) for p in self._held.pop(key)])
            self._free.append(self._memory.pop(key))

        self._start(f"RT{key} of {self._pair}", send)

    def finish(self) -> None:
        """The iteration is over: so must all transfers be.

        Raises:
            TransportError: one failed, is not over in time, or a micro-batch was never fetched.
        """
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.wait()
        if self._held:
            raise TransportError(f"pair {self._pair}: micro-batches {sorted(self._held)} are left")

    def forget(self) -> None:
        """See `AcceptorEnd`."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.wait()
        self._held.clear()
        self._free += self._memory.values()
        self._memory.clear()

    def close(self) -> None:
        """Stop the thread, free the memory."""
        self._worker.close()
        self._free.clear()
        self._held.clear()
        self._memory.clear()

    def _start(self, label: str, action: Callable[[], None]) -> None:
        for job in self._jobs:
            if job.error is not None:
                job.wait()  # raises: do not go on computing after a lost transfer
        self._jobs = [job for job in self._jobs if not job.done.is_set()]
        self._jobs.append(self._worker.start(label, action))

    def _room(self, size: int) -> torch.Tensor:
        fits = [m for m in self._free if m.numel() >= size]
        if fits:
            best = min(fits, key=torch.Tensor.numel)
            self._free = [m for m in self._free if m is not best]
            return best
        if self._free:  # too small for this one: make it larger instead of one more
            self._free.pop()
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _wait(requests: list[Any]) -> None:
    for request in requests:
        request.wait()
