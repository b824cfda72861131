"""Is the link fast enough? Watches one iteration's copies and forwards, then says so if it is not.

A copy that takes longer than the computation beside it makes the pipeline wait. An eviction runs
beside a backward and a load beside a forward, which is the shorter one: so it is the measure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_bpipe.runtime.transport import TransferHandle
from megatron_bpipe.schedule.ops import Kind, Op

MIB, GIB = 2**20, 2**30


@dataclass
class LinkWatch:
    """Observer of one iteration of an evictor; see `executor.Observer`.

    ``mark`` notes now on the stream that computes, ``between`` gives the seconds from one such note
    to another, when the iteration is over.
    """

    mark: Callable[[], object]
    between: Callable[[object, object], float]
    _begun: object = None
    _forwards: list[tuple[object, object]] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _transfers: list[TransferHandle] = field(default_factory=list)

    def forward_begins(self, op: Op) -> None:
        """Note the start."""
        self._begun = self.mark()

    def forward_done(self, op: Op, output: object) -> None:
        """Note the end."""
        self._forwards.append((self._begun, self.mark()))

    def op_done(self, op: Op, start: float, end: float, moved: int) -> None:
        """Note what moved."""
        if op.kind in (Kind.EVICT, Kind.LOAD):
            self._sizes.append(moved)

    def transfer_done(self, op: Op, transfer: TransferHandle) -> None:
        """Note when it moved."""
        self._transfers.append(transfer)

    @property
    def saw_transfers(self) -> bool:
        """Whether anything moved."""
        return bool(self._transfers)

    def verdict(self) -> str | None:
        """What to tell the user, None if the copies can hide.

        Once `saw_transfers`, when the iteration is over.
        """
        copies = [end - start for start, end in (transfer.span for transfer in self._transfers)]
        forwards = [self.between(*marks) for marks in self._forwards]
        size = int(statistics.median(self._sizes))
        # the fastest copy: messages also wait for the other end, which is no fault of the link
        return too_slow(size, min(copies), statistics.median(forwards))


def watch() -> LinkWatch:
    """A watch for the device at hand."""
    if torch.cuda.is_available():
        return LinkWatch(_event, _between_events)
    return LinkWatch(time.perf_counter, lambda a, b: b - a)  # type: ignore[operator]


def too_slow(size: int, copy: float, forward: float) -> str | None:
    """The warning of a link whose copies take longer than a forward; None if they do not.

    Args:
        size: bytes of one micro-batch.
        copy: seconds that they take.
        forward: seconds of one micro-batch's forward.
    """
    if copy <= forward:
        return None
    return (
        f"the link is too slow to hide the copies: {size / MIB:.1f} MiB a micro-batch at "
        f"{size / max(copy, 1e-9) / GIB:.1f} GiB/s take {copy * 1e3:.1f} ms, a forward "
        f"{forward * 1e3:.1f} ms. BPipe will cost time here (11-17 % were seen without NVLink): "
        "bring the pairs onto faster links, or raise --bpipe-budget"
    )


def _event() -> object:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(start: object, end: object) -> float:
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
