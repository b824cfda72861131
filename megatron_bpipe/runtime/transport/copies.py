"""Who copies bytes beside the computation: a thread on a CPU, a stream on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_bpipe.runtime.transport.base import TransferHandle
from megatron_bpipe.runtime.transport.worker import Job, Worker


class Copies(Protocol):
    """Copies in the order in which they are started, one micro-batch each."""

    def start(
        self, label: str, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> TransferHandle:
        """Start to copy each source to its target (flat uint8 tensors of equal sizes)."""

    def close(self) -> None:
        """Wait for what is under way, then stop."""


class ThreadCopies:
    """Copies on a thread of their own; ``copy_`` lets the interpreter lock go."""

    def __init__(self, deadline: float) -> None:
        self._worker = Worker(deadline)

    def start(
        self, label: str, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> Job:
        """See `Copies`."""
        targets, sources = list(targets), list(sources)

        def copy() -> None:
            # one call for a whole micro-batch lets the interpreter lock go once, so the main
            # thread keeps computing; a copy a storage would ask for the lock dozens of times
            torch._foreach_copy_(targets, sources)

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
