"""Is the link fast enough? Looks at an iteration now and then, and says if copies are waited for.

A copy that takes longer than the computation beside it makes the pipeline wait. What counts is
that wait, in each direction by itself: evictions hide behind backwards, loads behind forwards,
which are shorter, and one fast copy among slow ones proves nothing.
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
EXPOSED = 0.05  # share of an iteration that the copies of one direction may be waited for
EVERY = 100  # iterations from one look to the next: on CUDA a look waits for the device
IN_A_ROW = 2  # looks that must agree, so that one hiccup warns nobody
DIRECTIONS = {Kind.EVICT_WAIT: "evictions", Kind.LOAD_WAIT: "loads"}


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
    _transfers: dict[Kind, list[TransferHandle]] = field(default_factory=dict)

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
        self._transfers.setdefault(op.kind, []).append(transfer)

    @property
    def saw_transfers(self) -> bool:
        """Whether anything moved beside forwards, by which it is judged."""
        return bool(self._transfers and self._forwards)

    def verdict(self, share: float = EXPOSED) -> str | None:
        """What to tell the user; None if neither direction was waited for longer than allowed.

        Once `saw_transfers`, directly after the iteration; on CUDA it waits for the device.

        Args:
            share: of the iteration, that the copies of one direction may be waited for.
        """
        whole = self.between(self._forwards[0][0], self.mark())
        forward = statistics.median([self.between(*marks) for marks in self._forwards])
        size = int(statistics.median(self._sizes))
        for kind, transfers in self._transfers.items():
            exposed = sum(transfer.exposed for transfer in transfers)
            if exposed > share * whole:
                spans = [transfer.span for transfer in transfers]
                copy = statistics.median([end - start for start, end in spans])
                return waited_for(DIRECTIONS[kind], exposed, whole, size, copy, forward)
        return None

    def moving_or_recomputing(self, stage: int, stages: int) -> str:
        """Which of the two is cheaper on this stage, with what was seen; as `verdict`.

        Moving costs what is waited for, recomputing all layers one forward more a micro-batch.
        """
        whole = self.between(self._forwards[0][0], self.mark())
        again = sum(self.between(*marks) for marks in self._forwards)
        transfers = [one for each in self._transfers.values() for one in each]
        exposed = sum(transfer.exposed for transfer in transfers)
        spans = [transfer.span for transfer in transfers]
        copying = sum(end - start for start, end in spans)
        text = (
            f"{sum(self._sizes) / MIB:.1f} MiB out and back at "
            f"{_rate(sum(self._sizes) / max(copying, 1e-9))} are waited for {exposed * 1e3:.1f} of "
            f"{whole * 1e3:.1f} ms of an iteration; to recompute all layers of stage {stage} "
            f"instead would take {again * 1e3:.1f} ms: "
        )
        if exposed <= again:
            return f"{text}moving is cheaper"
        numbers = ",".join("N" if x == stage else "0" for x in range(stages))
        return f"{text}recomputing is cheaper, --bpipe-recompute {numbers} with N its layers"


@dataclass
class LinkSampler:
    """Which iterations are watched, and when there is news.

    The first iteration that evicts warms up. The next is watched, then one in `EVERY`; where it
    looks slow the one after it too. A slow spell is told of once, and is over when the copies of
    neither direction are waited for half as long as would start one.
    """

    watch: LinkWatch | None = None
    _until: int = 1
    _slow: int = 0  # looks in a row
    _told: bool = False
    _seen: LinkWatch | None = None  # the last that saw transfers

    def moving_or_recomputing(self, stage: int, stages: int) -> str | None:
        """`LinkWatch.moving_or_recomputing` of an iteration that has just been watched, or None."""
        seen, self._seen = self._seen, None
        return seen.moving_or_recomputing(stage, stages) if seen is not None else None

    def iteration_over(self) -> str | None:
        """An iteration with a store is over; returns what to tell the user, if anything."""
        seen, self.watch = self.watch, None
        if seen is None:
            self._until -= 1
            if self._until <= 0:
                self.watch = watch()
            return None
        if not seen.saw_transfers:  # no micro-batch left this time
            self.watch = watch()
            return None
        self._seen = seen
        said = seen.verdict(EXPOSED / 2 if self._told else EXPOSED)
        self._slow = 0 if said is None else self._slow + 1
        if 0 < self._slow < IN_A_ROW:
            self.watch = watch()
            return None
        self._until = EVERY - 1
        news = None if self._told else said
        self._told = said is not None
        return news


def watch() -> LinkWatch:
    """A watch for the device at hand."""
    if torch.cuda.is_available():
        return LinkWatch(_event, _between_events)
    return LinkWatch(time.perf_counter, lambda a, b: b - a)  # type: ignore[operator]


def waited_for(
    direction: str, exposed: float, whole: float, size: int, copy: float, forward: float
) -> str:
    """The warning of copies that do not hide, with what was seen.

    Args:
        direction: evictions or loads.
        exposed: seconds that the computation stood still for them.
        whole: seconds of the iteration.
        size: bytes of one micro-batch.
        copy: seconds that they take.
        forward: seconds of one micro-batch's forward.
    """
    cost = (
        f"{direction} were waited for {exposed * 1e3:.1f} of {whole * 1e3:.1f} ms of an iteration"
    )
    slow = too_slow(size, copy, forward)
    if slow is not None:
        return f"{cost}; {slow}"
    return (
        f"{cost}, although a copy of {size / MIB:.1f} MiB takes {copy * 1e3:.1f} ms and a forward "
        f"{forward * 1e3:.1f} ms: a copy starts late or its other end is late; look for a rank "
        "that is slower than the others, or for more busy threads than cores"
    )


def too_slow(size: int, copy: float, forward: float) -> str | None:
    """The words for a link whose copies take longer than a forward; None if they do not.

    Args:
        size: bytes of one micro-batch.
        copy: seconds that they take.
        forward: seconds of one micro-batch's forward.
    """
    if copy <= forward:
        return None
    return (
        f"the link is too slow to hide the copies: {size / MIB:.1f} MiB a micro-batch at "
        f"{_rate(size / max(copy, 1e-9))} take {copy * 1e3:.1f} ms, a forward "
        f"{forward * 1e3:.1f} ms. BPipe will cost time here (11-17 % were seen without NVLink): "
        "bring the pairs onto faster links, or raise --bpipe-budget"
    )


def _rate(bandwidth: float) -> str:
    """Bytes a second, as people read them."""
    if bandwidth < GIB / 10:
        return f"{bandwidth / MIB:.1f} MiB/s"
    return f"{bandwidth / GIB:.1f} GiB/s"


def _event() -> object:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(start: object, end: object) -> float:
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
