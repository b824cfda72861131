"""What one rank saw: every op's times and bytes, peaks of live memory, losses.

Serves stock and BPipe runs alike, so that both are measured with the same rule: the live bytes at
the boundary of every op, from weak references. It keeps the op times of the last iterations only
(`TIMELINE_ITERATIONS`), and start, end and losses of the last `KEPT`.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_bpipe.report.run import DIGEST
from megatron_bpipe.report.timeline import Event, Timeline
from megatron_bpipe.runtime.graph import nodes_below, roots_of
from megatron_bpipe.runtime.observe.audit import Audit, audit_forward
from megatron_bpipe.runtime.observe.memory import LiveActivations
from megatron_bpipe.runtime.observe.sizes import ActivationSizes, WorkingMemory
from megatron_bpipe.runtime.torch_internals import storage_id
from megatron_bpipe.runtime.transport import TransferHandle
from megatron_bpipe.schedule.ops import ActivationKey, Kind, Op, microbatches

TIMELINE_ITERATIONS = 8
CHANGES_MEMORY = frozenset(
    (
        *(Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT),
        *(Kind.EVICT, Kind.EVICT_WAIT, Kind.LOAD, Kind.LOAD_WAIT),
    )
)
FEW = 16  # floats of one tensor that are kept one by one
KEPT = 1000  # iterations whose times and losses are kept


@dataclass
class Peaks:
    """Highest values seen at any op boundary of any training iteration.

    They leave the first iteration out as soon as there is another: libraries allocate workspaces
    then that stay (cuBLAS), and caches that outlive it (of quantised weights, rotary tables) cannot
    be told from activations yet. ``allocator_bytes`` is above the level at the iteration's start.
    """

    activation_bytes: int = 0
    microbatches: float = 0
    allocator_bytes: int | None = None


@dataclass
class Recorder:
    """Observer of one rank.

    Args:
        stage: pipeline stage of this rank.
        rank: its global rank.
        allocated: the allocator's bytes in use, or None if it cannot say.
        static: bytes of tensors that are there between iterations; None: not looked at.
        watch_peak: starts to watch the allocator; what it returns gives the most bytes that were in
            use since then. None where the allocator keeps no peak: then it is sampled after every
            op and every node of the first backward.
    """

    stage: int
    rank: int
    allocated: Callable[[], int | None]
    watch_peak: Callable[[], Callable[[], int]] | None = None
    static: Callable[[], int] | None = None
    peaks: Peaks = field(default_factory=Peaks)
    iterations: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    losses: deque[list[str]] = field(default_factory=lambda: deque(maxlen=KEPT))
    timeline: deque[list[Event]] = field(default_factory=lambda: deque(maxlen=TIMELINE_ITERATIONS))
    audit: Audit | None = None
    left_for_weight_bytes: int | None = None  # most that one activation kept between B and W
    sizes: ActivationSizes = field(default_factory=ActivationSizes)
    working: WorkingMemory = field(default_factory=WorkingMemory)
    _before_forward: int | None = None
    _live: LiveActivations = field(default_factory=LiveActivations)
    _excluded: Collection[int] = ()
    _chunks: int = 1
    _parts: int = 1
    _for_weight: set[ActivationKey] = field(default_factory=set)  # B is over, W is not
    _in_use: int = 0  # live bytes at the last op boundary that the schedule accounts for
    _baseline: int | None = None
    _static_before: int | None = None  # bytes, before the first iteration
    _peak: Callable[[], int] | None = None
    _begun: float = 0.0
    _running: bool = False
    # perf_counter to wall clock, so that the ranks of a node share one axis
    _offset: float = field(default_factory=lambda: time.time() - time.perf_counter())
    _transfers: list[tuple[int, TransferHandle]] = field(default_factory=list)  # index of its event

    @property
    def between_iterations(self) -> int | None:
        """The allocator's bytes when the last iteration began; None if it cannot say."""
        return self._baseline

    def begin(
        self,
        excluded: Collection[int],
        chunks: int = 1,
        parts: int = 1,
        *,
        goes_on: bool = False,
    ) -> None:
        """A training iteration begins; ``excluded`` storages are not activations.

        ``chunks`` are the stage's model chunks (v): one activation counts 1/v micro-batches. Where
        it travels in ``parts``, each of them counts its share of that.
        ``goes_on``: the stage holds activations of the iteration before.
        """
        self._chunks, self._parts = chunks, parts
        if len(self.iterations) == 1:
            self.peaks = Peaks()
            self.settle()
        if not self.iterations and self.static is not None:
            self._static_before = self.static()
        if not goes_on:
            self._live.clear()
        self._excluded = excluded
        self._transfers.clear()
        self._baseline = self.allocated()
        self._peak = self.watch_peak() if self.watch_peak is not None else None
        self._begun = time.perf_counter()
        self.timeline.append([])
        self._running = True

    def settle(self) -> None:
        """Between the first iteration and the second: what has stayed is no working memory.

        The optimizer's state is new since then, and no activation either.
        """
        now = self.allocated()
        if now is not None and self.static is not None and self._static_before is not None:
            self.working.between_ops(now, self.static() - self._static_before)
        self._static_before = None

    def end(self, losses: list[Any]) -> None:
        """The iteration is over; ``losses`` is what Megatron's schedule returned."""
        span = self._begun + self._offset, time.perf_counter() + self._offset
        self.iterations.append(span)
        if self._peak is not None:
            self._allocator_is_at(self._peak())
        events = self.timeline[-1]
        for i, transfer in self._transfers:
            start, end = transfer.span
            events[i] = replace(
                events[i],
                copy_start=start + self._offset,
                copy_end=end + self._offset,
                exposed=transfer.exposed,
            )
        self._transfers.clear()
        self._running = False
        if losses:
            self.losses.append([bits for one in losses for bits in _float_bits(one)])

    def abandon(self) -> None:
        """The iteration has failed: it leaves nothing in the report."""
        if self._running:
            self._running = False
            self.timeline.pop()
        self._transfers.clear()
        self._for_weight.clear()
        self._live.clear()

    def forward_begins(self, op: Op) -> None:
        """See `executor.Observer`."""
        if self._audits(op):
            self._before_forward = self.allocated()

    def forward_done(self, op: Op, output: object) -> None:
        """See `executor.Observer`."""
        if self._audits(op):
            now, before = self.allocated(), self._before_forward
            allocated = None if now is None or before is None else now - before
            known = self._live.known()
            self.audit = audit_forward(op.microbatch, output, allocated, self._excluded, known)
        self._live.track_graph(op.key, output, self._excluded)
        if not self.iterations:
            self.sizes.note(op.chunk, output, self._live.bytes_of(op.key))
        # the first micro-batch's backward begins when the stage is fullest
        if self._peak is None and op.microbatch == 0:
            for node in nodes_below(roots_of(output)):
                if not node.name().endswith("AccumulateGrad"):  # outlives the micro-batch
                    node.register_hook(self._in_backward)

    def loaded(self, key: ActivationKey, storages: list[torch.UntypedStorage]) -> None:
        """A load allocated ``storages``."""
        self._live.track(key, storages)

    def left_for_weight(self, key: ActivationKey, tensors: Iterable[torch.Tensor]) -> None:
        """The B of an activation is over; ``tensors`` wait for its W, some of them new."""
        left = {storage_id(one): one for one in (t.untyped_storage() for t in tensors)}
        storages = [one for number, one in left.items() if number not in self._excluded]
        size = sum(one.nbytes() for one in storages)
        self.left_for_weight_bytes = max(self.left_for_weight_bytes or 0, size)
        self._live.track(key, storages)
        self._for_weight.add(key)

    def transfer_done(self, op: Op, transfer: TransferHandle) -> None:
        """See `executor.Observer`."""
        self._transfers.append((len(self.timeline[-1]), transfer))

    def op_done(self, op: Op, start: float, end: float, moved: int) -> None:
        """See `executor.Observer`."""
        present: float
        self._note_end(op)
        if op.kind in CHANGES_MEMORY or not self.timeline[-1]:
            live, count = self._live.sample(self._parts)
            present = microbatches(count, self._chunks * self._parts)
            self.peaks.activation_bytes = max(self.peaks.activation_bytes, live)
            self.peaks.microbatches = max(self.peaks.microbatches, present)
            if not self.iterations:
                self._look_at_allocator(live)
            now = self.allocated() if self._peak is None else None
        else:  # a message moves no activation
            last = self.timeline[-1][-1]
            live, present, now = last.live_bytes, last.live_microbatches, None
        self._allocator_is_at(now)
        wall = start + self._offset, end + self._offset
        self.timeline[-1].append(Event(str(op), *wall, moved, live, present))

    def _note_end(self, op: Op) -> None:
        """Note whether the schedule is done with an activation."""
        if op.kind is Kind.WEIGHT:
            self._for_weight.discard(op.key)
        elif op.kind is not Kind.BACKWARD or op.part or op.key in self._for_weight:
            return
        self._live.backward_over(op.key)

    def _audits(self, op: Op) -> bool:
        """The second micro-batch if there is one: caches are filled, shared tensors known."""
        return self.audit is None or (self.audit.microbatch == 0 and op.microbatch == 1)

    def _look_at_allocator(self, live: int) -> None:
        """The first iteration, op by op: how much there is beside activations."""
        before, self._in_use = self._in_use, live - self._live.left_behind()
        if self._peak is not None and self.watch_peak is not None:
            peak, self._peak = self._peak(), self.watch_peak()
            self._allocator_is_at(peak)
            self.working.within_op(peak, max(before, self._in_use))
        now = self.allocated()
        if now is not None:
            self.working.between_ops(now, self._in_use)

    def _in_backward(self, *_: object) -> None:
        """After a node's backward: what it works with is there besides what was saved."""
        now = self.allocated()
        self._allocator_is_at(now)
        if now is not None and not self.iterations and self.timeline[-1]:
            self.working.within_op(now, self._in_use)

    def _allocator_is_at(self, now: int | None) -> None:
        if now is not None and self._baseline is not None:
            above = now - self._baseline
            self.peaks.allocator_bytes = max(self.peaks.allocator_bytes or 0, above)

    @property
    def microbatches(self) -> int:
        """Of the last iteration (m)."""
        return len({op.microbatch for op in self._forwards()})

    @property
    def chunks(self) -> int:
        """Of this stage (v)."""
        return self._chunks

    @property
    def exposed_seconds(self) -> float | None:
        """Mean per iteration, over the timeline's; None if nothing moved."""
        seconds = [one for one in map(_exposed, self.timeline) if one is not None]
        return sum(seconds) / len(seconds) if seconds else None

    @property
    def last_exposed_seconds(self) -> float | None:
        """Of the last iteration; None if nothing moved."""
        return _exposed(self.timeline[-1]) if self.timeline else None

    def timeline_document(self) -> Timeline:
        """This rank's timeline file."""
        return Timeline(self.stage, self.rank, list(self.timeline))

    def _forwards(self) -> list[Op]:
        events = self.timeline[-1] if self.timeline else []
        ops = [Op.parse(event.op) for event in events]
        return [op for op in ops if op.kind is Kind.FORWARD]


def _exposed(events: Iterable[Event]) -> float | None:
    """Seconds that an iteration's computation waited for copies; None if nothing moved."""
    seconds = [event.exposed for event in events if event.exposed is not None]
    return sum(seconds) if seconds else None


def _float_bits(value: object) -> list[str]:
    """Exact hexadecimal form of every float in a loss report; of many one digest for all.

    The keys of a report may be of any kind; they are taken in an order of their own.
    """
    if isinstance(value, torch.Tensor):
        floats = value.detach().double().flatten()
        if floats.numel() > FEW:  # losses per token would fill the memory of a long run
            digest = hashlib.sha256(floats.cpu().numpy().tobytes()).hexdigest()
            return [f"{DIGEST}{digest}"]
        return [float(x).hex() for x in floats.tolist()]
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (type(key).__name__, str(key)))
        return [bits for key in keys for bits in _float_bits(value[key])]
    if isinstance(value, (list, tuple)):
        return [bits for one in value for bits in _float_bits(one)]
    return []
