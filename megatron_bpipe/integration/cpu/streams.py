"""Streams and events on a device that runs everything at once and in order.

The CPU has finished an operation when the call returns, so to wait for a stream or
an event is to do nothing. Megatron creates and waits for them in
``core/pipeline_parallel/p2p_communication.py``, ``core/timers.py`` and
``training/models/dist_utils.py``. Events keep the time of their record: timers that
subtract two of them tell the truth.
"""

import time

import torch

from megatron_bpipe.integration.cpu.replace import replace


class Event:
    """Stand in for ``torch.cuda.Event``: past from the moment it is recorded."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._recorded_s = 0.0

    def record(self, stream: object = None) -> None:
        """Take the time."""
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end_event: "Event") -> float:
        """Return the milliseconds from this record to the other."""
        return (end_event._recorded_s - self._recorded_s) * 1e3

    def query(self) -> bool:
        """Tell that all work before it is done."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def wait(self, stream: object = None) -> None:
        """Return at once."""


class Stream:
    """Stand in for ``torch.cuda.Stream``: work on it is done when the call returns."""

    def __init__(self, device: object = None, priority: int = 0, **kwargs: object) -> None:
        self.priority = priority
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the least and the greatest priority: there is one."""
        return (0, 0)

    def query(self) -> bool:
        """Tell that all work on it is done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event, a new one if none is given."""
        event = event if event is not None else Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Return at once."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def wait_stream(self, stream: object) -> None:
        """Return at once."""


class StreamContext:
    """Stand in for ``torch.cuda.stream``: every stream is the same place."""

    def __init__(self, stream: object) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


_STREAM = Stream()


def install() -> None:
    """Put these classes in the place of CUDA's, and make waiting for it instant."""
    replace(
        torch.cuda,
        Event=Event,
        ExternalStream=Stream,
        Stream=Stream,
        StreamContext=StreamContext,
        current_stream=lambda device=None: _STREAM,
        default_stream=lambda device=None: _STREAM,
        is_current_stream_capturing=lambda: False,
        set_stream=lambda stream: None,
        stream=StreamContext,
        synchronize=lambda device=None: None,
    )
    replace(torch.cuda.streams, Event=Event, ExternalStream=Stream, Stream=Stream)
    replace(torch.Tensor, record_stream=lambda self, stream: None)
