"""A thread that copies beside the computation.

`torch._foreach_copy_` lets the interpreter lock go once for a whole micro-batch, so the main
thread keeps computing; a copy a storage would ask for the lock dozens of times.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .base import TransportError


@dataclass
class CopyTicket:
    """One copy job; see `Ticket`."""

    label: str
    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    deadline: float
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    started: float = 0.0
    ended: float = 0.0

    def run(self) -> None:
        """Copy, on the copier's thread."""
        self.started = time.perf_counter()
        try:
            torch._foreach_copy_(self.targets, self.sources)
        except BaseException as error:  # it must reach the thread that waits
            self.error = error
        self.targets, self.sources = [], []  # the evicted storages must be free once waited for
        self.ended = time.perf_counter()
        self.done.set()

    def wait(self) -> None:
        """Block until copied.

        Raises:
            TransportError: not over within the deadline, or the copy itself failed.
        """
        if not self.done.wait(self.deadline):
            raise TransportError(f"{self.label} is not over after {self.deadline:.0f} s")
        if self.error is not None:
            raise TransportError(f"{self.label} failed: {self.error}") from self.error

    @property
    def span(self) -> tuple[float, float]:
        """Start and end in seconds."""
        return self.started, self.ended


class Copier:
    """One worker thread, jobs in order. A daemon: it never keeps a dying process alive."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._jobs: queue.SimpleQueue[CopyTicket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bpipe-copier", daemon=True)
        self._thread.start()

    def copy(
        self, label: str, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> CopyTicket:
        """Queue ``targets[i] <- sources[i]``."""
        ticket = CopyTicket(label, list(targets), list(sources), self._deadline)
        self._jobs.put(ticket)
        return ticket

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._jobs.put(None)
        self._thread.join(self._deadline)

    def _work(self) -> None:
        while (ticket := self._jobs.get()) is not None:
            ticket.run()
            del ticket  # keep no buffer alive while idle
