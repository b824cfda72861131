"""Streams whose work runs as late as their events allow, or at once.

Computation is eager, on a CPU, so only what is queued on other streams can be late: it runs when
something waits for it, and not before. A copy that nobody waits for is not made, so a wait that is
missing shows as wrong bytes. A copy that does not wait for the computation before it delivers
garbage (computation.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from tests.harness.stand_in_gpu.computation import Computation

LATE = True  # whether queued work waits until it must run; see `simulated_gpu`
STREAMS_A_PRIORITY = 32  # torch has so many, and deals them in turn; c10/cuda/CUDAStream.h
GARBAGE = 0xA5
_numbers = count(1)
_queues: dict[int, _Queue] = {}
_pools: dict[int, list[_Queue]] = {}  # by priority
_dealt: Counter[int] = Counter()
_here = threading.local()
violations: list[str] = []  # of rules that a GPU would not report
calls: Counter[str] = Counter()  # that torch would make of the driver
computations: list[Computation] = []  # the last one counts


class _Queue:
    """What one stream of the device is; several `Stream` objects may be dealt the same."""

    def __init__(self) -> None:
        self.handle = next(_numbers)
        self.work: deque[Callable[[], Any]] = deque()
        self.known = 0  # number of the last computation that comes before what is queued next
        _queues[self.handle] = self


class Stream:
    """Stand in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pool = _pools.setdefault(priority, [])
        if len(pool) < STREAMS_A_PRIORITY:
            pool.append(_Queue())
        self._queue = pool[_dealt[priority] % STREAMS_A_PRIORITY]
        _dealt[priority] += 1

    @property
    def cuda_stream(self) -> int:
        """The driver's handle."""
        return self._queue.handle

    @property
    def known(self) -> int:
        """Number of the last computation that comes before what is queued next."""
        return self._queue.known

    def put(self, work: Callable[[], Any]) -> None:
        """Queue ``work``."""
        _put(self._queue, work)

    def queued(self) -> list[Callable[[], Any]]:
        """What has not run yet."""
        return list(self._queue.work)

    def step(self) -> bool:
        """Run the oldest work; False if there is none."""
        return _step(self._queue)

    def synchronize(self) -> None:
        """Run everything."""
        calls["synchronize"] += 1
        while self.step():
            pass
        _host_waited_for(self.known)

    def wait_event(self, event: Event) -> None:
        """What is queued from here on comes after ``event``, as it was recorded last."""
        calls["wait"] += 1
        self._queue.known = max(self._queue.known, event.known)
        self.put(event.mark())

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

    def __init__(self) -> None:
        self._queue = _Queue()

    @property
    def known(self) -> int:
        """Number of the last computation queued."""
        return computations[-1].now if computations else 0

    def put(self, work: Callable[[], Any]) -> None:
        """Run ``work``."""
        with _as_another_stream():
            work()


class Event:
    """Stand in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing
        self.stream: Stream | None = None
        self.known = 0
        self._at: list[float] = []  # of the last record, empty until it happens

    def record(self, stream: Stream | None = None) -> None:
        """Put it at the end of a stream's queue."""
        if self.stream is None:
            calls["create"] += 1  # torch makes the event when it is first recorded
        calls["record"] += 1
        self.stream, at = stream or current_stream(), []
        self._at, self.known = at, self.stream.known
        self.stream.put(lambda: at.append(time.perf_counter()))

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
        calls["synchronize"] += 1
        self.mark()()
        _host_waited_for(self.known)

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


def copy(handle: int, target: int, source: int, size: int, move: Callable[..., object]) -> bool:
    """Queue a copy, which the driver makes with ``move``; False if it goes past a tensor's end."""
    queue = _queues[handle]
    computation = computations[-1]
    if any(computation.past_an_end(address, size) for address in (target, source)):
        return False
    why = computation.too_early(target, source, size, queue.known)
    if why is not None:
        violations.append(f"a copy starts too early: {why}")
        move = _deliver_garbage
    _put(queue, functools.partial(move, target, source, size))
    return True


def copies_under_way() -> Iterator[tuple[int, int, int]]:
    """Target, source and size of every copy that has not run."""
    for queue in _queues.values():
        for work in queue.work:
            if isinstance(work, functools.partial):
                yield work.args


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Streams that no earlier test has used; this thread's operations are numbered from here on."""
    violations.clear()
    _pools.clear()
    _dealt.clear()
    computation = Computation()
    computations.append(computation)
    try:
        with computation:
            yield
    finally:
        computations.pop()


def _put(queue: _Queue, work: Callable[[], Any]) -> None:
    queue.work.append(work)
    if not LATE:
        while _step(queue):
            pass


def _step(queue: _Queue) -> bool:
    if not queue.work:
        return False
    with _as_another_stream():
        queue.work.popleft()()
    return True


def _deliver_garbage(target: int, source: int, size: int) -> None:
    ctypes.memset(target, GARBAGE, size)


def _as_another_stream() -> contextlib.AbstractContextManager[None]:
    return computations[-1].paused() if computations else contextlib.nullcontext()


def _host_waited_for(number: int) -> None:
    if computations:
        computations[-1].done = max(computations[-1].done, number)
