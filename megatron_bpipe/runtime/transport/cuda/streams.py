"""Copies on a stream of their own, ordered by events; the host waits for nothing.

    compute   F3 | record | B0 ................. | wait done | (blocks of F3 freed, used again)
    copies          wait | E3 .......... | done

Why freed memory may be used again at once. A block that an eviction frees was allocated on the
compute stream, so the caching allocator gives it only to work of that stream (or, through
``record_stream``, later still). `StreamTransferHandle.wait` has made the compute stream wait for
the copy *before* the store drops the block: whatever uses the memory next comes after the copy.
``record_stream`` would instead hold the block back until the allocator next looks at its events,
which is a peak that the schedule does not know of.

Why loads are safe. Their targets are allocated on the compute stream and may be memory that work
queued there still uses. The copy stream waits for an event recorded on the compute stream *after*
the allocation; everything queued before it is over by then.

Why the backward is safe. Autograd runs each node on the stream its forward ran on, whatever thread
it uses, and unpacking only makes views. So an event that the compute stream waits for at LW comes
before every kernel of the backward.

One stream for both directions: it orders a load and the next eviction into the same room. Whole
activations leave beside a backward and come back beside a forward, never both at once; parts may do
both beside one step, and take turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from megatron_bpipe.runtime.transport.copies import Part
from megatron_bpipe.runtime.transport.cuda import driver


class _Clock:
    """Times of events on `time.perf_counter`'s axis."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._event: torch.cuda.Event | None = None
        self._at = 0.0

    def times(self, queued: float, *events: torch.cuda.Event) -> tuple[float, ...]:
        """When ``events`` happened, queued on the stream at or before ``queued``; waits."""
        if self._event is None or self._at <= queued:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(self._stream)
            self._event.synchronize()
            self._at = time.perf_counter()
        reference = self._event
        return tuple(self._at - event.elapsed_time(reference) / 1e3 for event in events)


class StreamTransferHandle:
    """One micro-batch's copies; see `TransferHandle`."""

    def __init__(
        self,
        start: torch.cuda.Event,
        end: torch.cuda.Event,
        clock: _Clock,
        held: Sequence[torch.Tensor],
    ) -> None:
        self._start, self._end, self._clock = start, end, clock
        self._queued = time.perf_counter()
        # Nobody else may hold these: without this their memory could go to other work while it
        # is being copied.
        self._held = list(held)
        self._waited: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def wait(self) -> None:
        """Make the current stream wait; the host goes on."""
        stream = torch.cuda.current_stream()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(self._end)
        after.record(stream)
        self._waited = before, after
        self._held.clear()

    @property
    def span(self) -> tuple[float, float]:
        """See `TransferHandle`; waits for the device."""
        start, end = self._clock.times(self._queued, self._start, self._end)
        return start, end

    @property
    def exposed(self) -> float:
        """See `TransferHandle`; waits for the device."""
        assert self._waited is not None
        before, after = self._waited
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3


class StreamCopies:
    """See `Copies`.

    Args:
        device: the GPU that computes; copies from and to anything it can reach.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = copy_stream(device)
        self._device = device
        self._clock = _Clock(self.stream)
        self._in_one_call = driver.copies_in_one_call() is not None

    def start(self, label: str, parts: Sequence[Part], *, out: bool) -> StreamTransferHandle:
        """See `Copies`; ``label`` is a range in a profile."""
        with torch.cuda.nvtx.range(label):
            start = self.begin()
            self.copy(addresses(parts, out=out))
            return self.end(start, [part.piece for part in parts])

    def begin(self) -> torch.cuda.Event:
        """Make the copy stream wait for all that the current stream has been given so far."""
        self.stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        start = torch.cuda.Event(enable_timing=True)
        start.record(self.stream)
        return start

    def copy(self, copies: Sequence[driver.Copy]) -> None:
        """Queue copies, which must not depend on each other."""
        if not copies:
            return
        stream = self.stream.cuda_stream
        if self._in_one_call:
            self._in_one_call = driver.copy_all(copies, stream)
            if self._in_one_call:
                return
        driver.copy_each(copies, stream)

    def end(self, start: torch.cuda.Event, held: Sequence[torch.Tensor]) -> StreamTransferHandle:
        """The handle of all that has been queued since ``start``."""
        end = torch.cuda.Event(enable_timing=True)
        end.record(self.stream)
        return StreamTransferHandle(start, end, self._clock, held)

    def close(self) -> None:
        """See `Copies`."""
        self.stream.synchronize()


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no message runs on.

    torch deals streams from one round-robin pool a priority. NCCL's process groups draw theirs
    with the lowest priority, and with the highest where asked to (``is_high_priority_stream``); a
    copy on a stream dealt twice would wait for messages, and they for it. Between the two is a pool
    that neither draws from, on every GPU with more than two priorities (V100 and later have six).
    """
    return torch.cuda.Stream(device, priority=-1)


def addresses(parts: Sequence[Part], *, out: bool) -> list[driver.Copy]:
    """What the driver is to copy, out to the pool or back."""
    pools = {id(part.pool): part.pool.data_ptr() for part in parts}
    there = [pools[id(part.pool)] + part.at for part in parts]
    here = [part.piece.data_ptr() + part.begin for part in parts]
    targets, sources = (there, here) if out else (here, there)
    return list(zip(targets, sources, (part.size for part in parts), strict=True))
