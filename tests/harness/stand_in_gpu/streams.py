"""Streams whose work runs as late as their events allow, or at once.

Computation is eager, on a CPU, so only what is queued on other streams can be late: it runs when
something waits for it, and not before. A copy that nobody waits for is not made, so a wait that is
missing shows as wrong bytes.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

LATE = True  # whether queued work waits until it must run; see `simulated_gpu`
_numbers = count(1)
_streams: dict[int, Stream] = {}
_here = threading.local()
violations: list[str] = []  # of rules that a GPU would not report


class Stream:
    """Stand in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda_stream = next(_numbers)
        self._queue: deque[Callable[[], None]] = deque()
        self._after_computation = False  # since the last batch of copies
        self._copying = False
        _streams[self.cuda_stream] = self

    def put(self, work: Callable[[], None]) -> None:
        """Queue ``work``."""
        self._queue.append(work)
        if not LATE:
            self.synchronize()

    def copy(self, work: Callable[[], None]) -> None:
        """Queue a copy; in CUDA it could run before the kernels that make its source."""
        if not self._after_computation:
            violations.append("a copy does not wait for what was computed before it")
        self._copying = True
        self.put(work)

    def queued(self) -> list[Callable[[], None]]:
        """What has not run yet."""
        return list(self._queue)

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
        """What is queued from here on comes after ``event``, as it was recorded last."""
        if isinstance(event.stream, Computing):
            self._after_computation, self._copying = True, False
        self.put(event.mark())

    def wait_stream(self, stream: Stream) -> None:
        """What is queued from here on comes after what is queued there by now."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """An event at this place of the queue."""
        event = event or Event()
        event.record(self)
        return event

    def batch_ends(self) -> None:
        """An event was recorded: copies after it are another batch."""
        if self._copying:
            self._after_computation = self._copying = False


class Computing(Stream):
    """The stream that computes: all its work is done when it is called for."""

    def put(self, work: Callable[[], None]) -> None:
        """Run ``work``."""
        work()


class Event:
    """Stand in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing
        self.stream: Stream | None = None
        self._at: list[float] = []  # of the last record, empty until it happens

    def record(self, stream: Stream | None = None) -> None:
        """Put it at the end of a stream's queue."""
        self.stream, at = stream or current_stream(), []
        self._at = at
        self.stream.put(lambda: at.append(time.perf_counter()))
        if self._timed:  # a transfer's end; those of messages between copies are not
            self.stream.batch_ends()

    def mark(self) -> Callable[[], None]:
        """What runs all that comes before the last record, and it."""
        stream, at = self.stream, self._at
        assert stream is not None, "waits for an event that was never recorded"

        def reach() -> None:
            while not at:
                assert stream.step(), "waits for an event that cannot happen"

        return reach

    def synchronize(self) -> None:
        """Run what comes before it, and it."""
        self.mark()()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``."""
        assert self._timed
        assert end._timed
        if not self._at or not end._at:
            raise RuntimeError("CUDA error: device not ready")
        return (end._at[0] - self._at[0]) * 1e3


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


def copies_under_way() -> Iterator[tuple[int, int, int]]:
    """Target, source and size of every copy that has not run."""
    for stream in _streams.values():
        for work in stream.queued():
            if isinstance(work, functools.partial):
                yield work.args


def stream_of(handle: int) -> Stream:
    """The stream with this ``cuda_stream``."""
    return _streams[handle]
