"""Streams whose work runs as late as their events allow, or at once.

Computation is eager, on a CPU, so only what is queued on other streams can be late: it runs when
something waits for it, and not before. A copy that nobody waits for is not made, so a wait that is
missing shows as wrong bytes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

LATE = True  # whether queued work waits until it must run; see `simulated_gpu`
_numbers = count(1)
_streams: dict[int, Stream] = {}
_here = threading.local()


class Stream:
    """Stand in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda_stream = next(_numbers)
        self._queue: deque[Callable[[], None]] = deque()
        _streams[self.cuda_stream] = self

    def put(self, work: Callable[[], None]) -> None:
        """Queue ``work``."""
        self._queue.append(work)
        if not LATE:
            self.synchronize()

    def step(self) -> bool:
        """Run the oldest work; False if there is none."""
        if not self._queue:
            return False
        self._queue.popleft()()
        return True

    def synchronize(self) -> None:
        """Run everything."""
        while self.step():
            pass

    def wait_event(self, event: Event) -> None:
        """What is queued from here on comes after ``event``."""
        self.put(event.synchronize)

    def wait_stream(self, stream: Stream) -> None:
        """What is queued from here on comes after what is queued there by now."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """An event at this place of the queue."""
        event = event or Event()
        event.record(self)
        return event


class Computing(Stream):
    """The stream that computes: all its work is done when it is called for."""

    def put(self, work: Callable[[], None]) -> None:
        """Run ``work``."""
        work()


class Event:
    """Stand in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing
        self._stream: Stream | None = None
        self._at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Put it at the end of a stream's queue."""
        self._stream, self._at = stream or current_stream(), None
        self._stream.put(self._happen)

    def _happen(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Run what comes before it, and it."""
        while self._at is None:
            assert self._stream is not None, "waits for an event that was never recorded"
            assert self._stream.step(), "waits for an event that cannot happen"

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``."""
        assert self._timed
        assert end._timed
        if self._at is None or end._at is None:
            raise RuntimeError("CUDA error: device not ready")
        return (end._at - self._at) * 1e3


class Within:
    """Stand in for ``torch.cuda.stream``."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = current_stream()
        _here.stream = self._stream

    def __exit__(self, *error: object) -> None:
        _here.stream = self._before


def current_stream(device: Any = None) -> Stream:
    """Stand in for ``torch.cuda.current_stream``."""
    if not hasattr(_here, "stream"):
        _here.stream = Computing()
    return _here.stream


def stream_of(handle: int) -> Stream:
    """The stream with this ``cuda_stream``."""
    return _streams[handle]
