"""GPUs with one hardware queue each, as ``CUDA_DEVICE_MAX_CONNECTIONS=1`` makes them.

Who waits for whom, and nothing else: nothing is computed or copied. All streams of a GPU put their
work into its one queue, in the order in which the host issues it. Work starts when it is at the
head and all that its stream was given before is over, so a wait for an event, and the record of
one, hold up the queue until they are through. Only a message runs on while the queue goes on, and
is over when its counterpart has started at the other end, as NCCL's kernels are. With ``strict`` it
holds up the queue too.

Whether all of it comes to an end is what a test asks.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch

from tests.harness.stand_in_gpu import streams as late_streams

Route = tuple[object, int, int]  # communicator, sender, receiver


@dataclass
class Work:
    """One thing in a queue."""

    what: str
    before: Work | None  # on the same stream
    ready: Callable[[], bool] = lambda: True
    messages: tuple[tuple[Route, bool], ...] = ()  # and whether it is the sender's
    turns: tuple[int, ...] = ()  # how many messages of the route came before each
    started: bool = False
    over: bool = False


@dataclass
class Machines:
    """Several GPUs, and what has been sent between them."""

    strict: bool = False
    devices: list[Device] = field(default_factory=list)
    begun: dict[tuple[Route, bool], int] = field(default_factory=lambda: defaultdict(int))

    def run(self) -> list[str]:
        """Run everything; returns what is at the heads of the queues that do not get on."""
        while any(device.step() for device in self.devices):
            pass
        return [device.queue[0].what for device in self.devices if device.queue]


@dataclass
class Device:
    """One GPU."""

    machines: Machines
    number: int
    queue: deque[Work] = field(default_factory=deque)
    running: list[Work] = field(default_factory=list)

    def put(self, stream: Stream, what: str, **how: object) -> Work:
        """Issue work to a stream."""
        work = Work(f"{what} on GPU {self.number}", stream.last, **how)  # type: ignore[arg-type]
        stream.last = work
        self.queue.append(work)
        return work

    def step(self) -> bool:
        """Start what can start, end what can end; False if nothing can."""
        moved = False
        for work in list(self.running):
            if self._through(work):
                work.over = moved = True
                self.running.remove(work)
        while self.queue:
            work = self.queue[0]
            if not work.started:
                if (work.before is not None and not work.before.over) or not work.ready():
                    break
                self._start(work)
                moved = True
            if work.messages and not self.machines.strict:
                self.running.append(work)
            elif self._through(work):
                work.over = moved = True
            else:
                break
            self.queue.popleft()
        return moved

    def _start(self, work: Work) -> None:
        work.started = True
        turns = []
        for message in work.messages:
            turns.append(self.machines.begun[message])
            self.machines.begun[message] += 1
        work.turns = tuple(turns)

    def _through(self, work: Work) -> bool:
        """Whether the counterpart of each of its messages has started."""
        begun = self.machines.begun
        return all(
            begun[route, not sends] > turn
            for (route, sends), turn in zip(work.messages, work.turns, strict=True)
        )


class Stream:
    """Stand in for ``torch.cuda.Stream``, on the GPU in use."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device = _in_use[-1]
        self.last: Work | None = None
        self.cuda_stream = len(_by_handle) + 1
        _by_handle[self.cuda_stream] = self

    def record_event(self, event: Event | None = None) -> Event:
        """An event here."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Hold up the queue until the event is over."""
        recorded = event.recorded
        assert recorded is not None
        self.device.put(self, "a wait", ready=lambda: recorded.over)

    def wait_stream(self, stream: Stream) -> None:
        """Hold up the queue until what the other stream has been given is over."""
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """Not in these tests: the host does not wait."""
        raise AssertionError("the host waits")


class Event:
    """Stand in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded: Work | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Put it at the end of a stream's work."""
        stream = stream or current_stream()
        self.recorded = stream.device.put(stream, "an event")


class Group:
    """One rank's end of a communicator: its messages are on a stream of its own."""

    def __init__(self, name: object, rank: int) -> None:
        self._name, self._rank = name, rank
        self._stream = Stream()

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int = 0) -> Request:
        """One message."""
        return self.exchange([peer], [])

    def recv(self, tensors: Sequence[torch.Tensor], peer: int, tag: int = 0) -> Request:
        """One message."""
        return self.exchange([], [peer])

    def exchange(self, to: Sequence[int], of: Sequence[int]) -> Request:
        """Messages posted together are one kernel."""
        self._stream.wait_event(current_stream().record_event())
        sent = [((self._name, self._rank, peer), True) for peer in to]
        received = [((self._name, peer, self._rank), False) for peer in of]
        what = f"messages to {list(to)} and of {list(of)} in {self._name}"
        self._stream.device.put(self._stream, what, messages=(*sent, *received))
        return Request(self._stream.record_event())


class Request:
    """What a message gives back."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def wait(self) -> None:
        """The current stream waits."""
        current_stream().wait_event(self._event)


_in_use: list[Device] = []
_by_handle: dict[int, Stream] = {}
_streams: list[Stream] = []


def current_stream(device: object = None) -> Stream:
    """Stand in for ``torch.cuda.current_stream``."""
    return _streams[-1]


@contextlib.contextmanager
def within(stream: Stream) -> Iterator[None]:
    """Stand in for ``torch.cuda.stream``."""
    _streams.append(stream)
    try:
        yield
    finally:
        _streams.pop()


@contextlib.contextmanager
def on(device: Device) -> Iterator[Stream]:
    """The host of this GPU issues work; gives the stream that computes."""
    _in_use.append(device)
    stand_ins = {
        "Stream": Stream,
        "Event": Event,
        "stream": within,
        "current_stream": current_stream,
    }
    try:
        with contextlib.ExitStack() as patches:
            for name, stand_in in stand_ins.items():
                patches.enter_context(mock.patch.object(torch.cuda, name, stand_in))
            patches.enter_context(mock.patch.object(late_streams, "copy", _copy))
            computing = Stream()
            patches.enter_context(within(computing))
            yield computing
    finally:
        _in_use.pop()


def _copy(handle: int, *_: object) -> bool:
    """A copy, in the place of `streams.copy`; ``handle`` is of its stream."""
    _in_use[-1].put(_by_handle[handle], "a copy")
    return True
