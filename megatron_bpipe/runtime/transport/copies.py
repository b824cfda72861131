"""Who copies bytes beside the computation: a thread on a CPU, a stream on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from megatron_bpipe.runtime.torch_internals import copy_all
from megatron_bpipe.runtime.transport.base import TransferHandle
from megatron_bpipe.runtime.transport.worker import Job, Worker


class Part(NamedTuple):
    """``size`` bytes of the pool, and the bytes of an activation that belong there.

    Both tensors are flat and uint8.
    """

    pool: torch.Tensor
    at: int
    piece: torch.Tensor
    begin: int
    size: int


class Copies(Protocol):
    """Copies in the order in which they are started, one micro-batch each."""

    def start(self, label: str, parts: Sequence[Part], *, out: bool) -> TransferHandle:
        """Start to copy each part, out to the pool or back."""

    def close(self) -> None:
        """Wait for what is under way, then stop."""


class ThreadCopies:
    """Copies on a thread of their own; ``copy_`` lets the interpreter lock go."""

    def __init__(self, deadline: float) -> None:
        self._worker = Worker(deadline)

    def start(self, label: str, parts: Sequence[Part], *, out: bool) -> Job:
        """See `Copies`."""
        there = [part.pool[part.at : part.at + part.size] for part in parts]
        here = [part.piece[part.begin : part.begin + part.size] for part in parts]

        def copy() -> None:
            # one call for a whole micro-batch lets the interpreter lock go once, so the main
            # thread keeps computing; a copy a storage would ask for the lock dozens of times
            if here:
                copy_all(*((there, here) if out else (here, there)))

        return self._worker.start(label, copy)

    def close(self) -> None:
        """See `Copies`."""
        self._worker.close()


def copies_on(device: torch.device, deadline: float) -> Copies:
    """What copies to and from memory of ``device``.

    Args:
        device: where activations are computed.
        deadline: seconds that a thread's copy may take; a stream has no such limit.
    """
    if device.type == "cuda":
        from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies

        return StreamCopies(device)
    return ThreadCopies(deadline)
