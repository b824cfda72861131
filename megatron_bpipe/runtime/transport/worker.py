"""One thread beside the computing one, that does a transport's jobs in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_bpipe.runtime.transport.base import TransportError


@dataclass
class Job:
    """A transfer on a worker thread; see `TransferHandle`."""

    label: str
    action: Callable[[], None] | None
    deadline: float
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    started: float = 0.0
    ended: float = 0.0
    exposed: float = 0.0

    def wait(self) -> None:
        """Block until over.

        Raises:
            TransportError: it failed, or is not over within the deadline.
        """
        begun = time.perf_counter()
        if not self.done.wait(self.deadline):
            raise TransportError(f"{self.label} is not over after {self.deadline:.0f} s")
        self.exposed = time.perf_counter() - begun
        if self.error is not None:
            raise TransportError(f"{self.label} failed: {self.error}") from self.error

    @property
    def span(self) -> tuple[float, float]:
        """Start and end in seconds."""
        return self.started, self.ended


class Worker:
    """Jobs in order on one daemon thread. After a failure every later job fails too."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._failed: BaseException | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bpipe-transfers", daemon=True)
        self._thread.start()

    def start(self, label: str, action: Callable[[], None]) -> Job:
        """Queue ``action``."""
        job = Job(label, action, self._deadline)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Stop after what is queued; a worker that hangs in a dead connection is left behind."""
        self._jobs.put(None)
        self._thread.join(1.0)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.started = time.perf_counter()
            try:
                if self._failed is not None:
                    raise self._failed
                assert job.action is not None
                job.action()
            except BaseException as error:  # it must reach the thread that waits
                self._failed = job.error = error
            job.action = None  # it holds the tensors that are to be freed
            job.ended = time.perf_counter()
            job.done.set()
            del job
