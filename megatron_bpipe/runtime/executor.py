"""The executor: runs one stage's list of lowered ops, each op through one handler.

    op      handler
    RF SF   receive / send an activation         Stage.exchange (Megatron's communicator)
    RB SB   receive / send a gradient            Stage.exchange
    F  B    one micro-batch in one model chunk   Stage
    W       its weight gradients                 Stage, where the schedule splits the backward
    E  EW   copy out starts / is over            ActivationStore
    L  LW   copy back starts / is over           ActivationStore
    AC RT   the acceptor's part                  AcceptorEnd (nothing for a one-sided transport)

The list decides everything: order, overlap and what leaves. Messages that are posted together come
as one group (`schedule.lowering.batches`); whichever schedule the list is of, it runs here.

A backward that is written part by part is one call of the stage. What stands between its parts is
done from within, when the backward reaches the next part (`steps`), or asks for something of it.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

from megatron_bpipe.runtime.graph import roots_of
from megatron_bpipe.runtime.steps import on_reaching
from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport import AcceptorEnd, TransferHandle
from megatron_bpipe.schedule.lowering.lower import batches
from megatron_bpipe.schedule.ops import MESSAGES, ActivationKey, Kind, Op, PartKey

SHOWN_AROUND = 12  # ops before and after a failed one


class Stage(Protocol):
    """What a pipeline stage can do; `op` says for which activation."""

    def exchange(self, ops: Sequence[Op]) -> None:
        """Post these messages together: RF, SF, RB, SB, at most one of each.

        What is received need not have arrived before `forward` or `backward` asks for it.
        """

    def forward(self, op: Op) -> object:
        """Compute the output and return it."""

    def backward(self, op: Op) -> None:
        """Compute gradients; where the schedule has W, of weights only those that W leaves out."""

    def weight(self, op: Op) -> None:
        """Compute the weight gradients that the B of this activation left."""


class Acceptor(Protocol):
    """What an acceptor lends."""

    @property
    def early(self) -> bool:
        """Whether every forward waits for the pool, not only those of the last chunk."""

    def of(self, evictor: int | None) -> AcceptorEnd:
        """What it lends to this stage; None where there is one evictor, the paper's partner."""

    def finish(self) -> None:
        """See `AcceptorEnd`."""

    def open(self) -> None:
        """A forward of the last chunk is next: wait until the pool is there; later do nothing."""


class Observer(Protocol):
    """Told of every op when it is over; times in seconds on `time.perf_counter`'s clock."""

    def op_done(self, op: Op, start: float, end: float, moved: int) -> None:
        """``op`` ran from ``start`` to ``end``; ``moved`` bytes for E and L, else 0."""

    def transfer_done(self, op: Op, transfer: TransferHandle) -> None:
        """The computation has been made to wait for the copy that EW or LW is about.

        When the copy really ran says ``transfer.span``, to be read when the iteration is over.
        """

    def forward_begins(self, op: Op) -> None:
        """``op`` is about to compute; its input is there."""

    def forward_done(self, op: Op, output: object) -> None:
        """``op``'s graph is complete and nothing of it has left yet."""


class ScheduleExecutor:
    """One stage's run through one iteration's ops."""

    def __init__(
        self,
        ops: Sequence[Op],
        stage: Stage,
        store: ActivationStore | None = None,
        acceptor_end: Acceptor | None = None,
        observers: Sequence[Observer] = (),
        name: str = "this stage",
        range_of: Callable[[str], AbstractContextManager[object]] | None = None,
        ends_empty: bool = True,
        leaving: Collection[ActivationKey] = (),
    ) -> None:
        """Of one iteration.

        Args:
            ops: what to run.
            stage: runs messages and computations.
            store: runs transfers, if there are any.
            acceptor_end: lends memory, if this stage does.
            observers: told of every op.
            name: of this stage, for messages.
            range_of: gets the text of each op and is around it: for a profiler's ranges.
            ends_empty: nothing is left when the ops have run; not so without a flush.
            leaving: what begins here and leaves in a later iteration, whole.
        """
        self._ops = ops
        self._range_of = range_of
        self._stage = stage
        self._store = store
        self._acceptor_end = acceptor_end
        self._observers = observers
        self._name = name
        self._ends_empty = ends_empty
        self._leaving: dict[ActivationKey, set[int]] = {key: {0} for key in leaving}
        for op in ops:
            if op.kind is Kind.EVICT:
                self._leaving.setdefault(op.key, set()).add(op.moved[1])
        self._stepped = {op.key for op in ops if op.kind is Kind.BACKWARD and op.part}
        self._pending: deque[tuple[Op, ...]] = deque()  # inside a backward: what is still to come
        self._at = 0  # the part it has come to
        self._computing: tuple[Op, float] | None = None  # that part, since when
        self._reached = self._weak_reach()
        self._last_chunk = max((op.chunk for op in ops), default=0)
        self._moved = 0
        self._handlers: Mapping[Kind, Callable[[Op], object]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.WEIGHT: self._weight,
            Kind.EVICT: self._evict,
            Kind.EVICT_WAIT: self._evict_wait,
            Kind.LOAD: self._load,
            Kind.LOAD_WAIT: self._load_wait,
            Kind.ACCEPT: self._accept,
            Kind.RETURN: self._give_back,
        }

    def _weak_reach(self) -> Callable[[int], None]:
        """`_reach`, for those who outlive this iteration.

        The store and hooks of a graph must not keep the stage: with it goes the process group, and
        with the group the connections by whose end the other ranks notice that this one failed.
        """
        method = weakref.WeakMethod(self._reach)

        def reached(part: int) -> None:
            reach = method()
            assert reach is not None, "a backward runs after its iteration"
            reach(part)

        return reached

    def run(self) -> None:
        """Run every op in order.

        Raises:
            Exception: whatever an op raised, with a note that names the op and shows the list.
        """
        if self._store is not None:
            self._store.fetch_by(partial(_bring_back, self._reached))
        groups = batches(self._ops)
        for group in groups:
            first = group[0]
            if first.kind is Kind.BACKWARD and first.part:
                self._backward_in_parts(first, _until_its_end(groups))
            else:
                self._run_group(group)
        if self._ends_empty and self._store is not None:
            self._store.check_empty()
        if self._ends_empty and self._acceptor_end is not None:
            self._acceptor_end.finish()

    def _run_group(self, group: Sequence[Op]) -> None:
        start = time.perf_counter()
        self._moved = 0
        with self._noted(group):
            self._do(group)
        self._done(group, start)

    def _done(self, group: Sequence[Op], start: float) -> None:
        end = time.perf_counter()
        for observer in self._observers:
            for op in group:
                observer.op_done(op, start, end, self._moved)

    @contextmanager
    def _noted(self, group: Sequence[Op]) -> Iterator[None]:
        """Around an op: its range, and a note on what it raises."""
        try:
            with self._range(group):
                yield
        except Exception as error:
            if not getattr(error, "__notes__", None):  # an op inside this one has told already
                error.add_note(self._failure_note(group[0]))
            raise

    def _backward_in_parts(self, first: Op, rest: Iterator[tuple[Op, ...]]) -> None:
        """One backward, and what stands between its parts from within it."""
        self._pending.extend(rest)
        self._at = first.moved[1]
        self._computing = first, time.perf_counter()
        with self._noted([first]):
            self._stage.backward(first)
        self._reach(0)
        self._part_over()
        if self._store is not None:
            self._store.consume(first.key)

    def _reach(self, part: int) -> None:
        """The backward has come to this part: do what stands before it."""
        while self._at > part:
            group = self._pending.popleft()
            self._part_over()
            if group[0].kind is Kind.BACKWARD:
                self._at = group[0].moved[1]
                self._computing = group[0], time.perf_counter()
            else:
                self._run_group(group)

    def _part_over(self) -> None:
        computing, self._computing = self._computing, None
        if computing is not None:
            self._moved = 0
            self._done([computing[0]], computing[1])

    def _range(self, group: Sequence[Op]) -> AbstractContextManager[object]:
        if self._range_of is None:
            return nullcontext()
        return self._range_of(" ".join(str(op) for op in group))

    def _do(self, group: Sequence[Op]) -> None:
        if group[0].kind in MESSAGES:
            self._stage.exchange(group)
        else:
            self._handlers[group[0].kind](group[0])

    def _forward(self, op: Op) -> None:
        end = self._acceptor_end
        if end is not None and (op.chunk == self._last_chunk or end.early):
            end.open()
        for observer in self._observers:
            observer.forward_begins(op)
        output = self._stage.forward(op)
        for observer in self._observers:
            observer.forward_done(op, output)
        if self._store is not None:
            self._store.measure(op.key, output)
            if op.key in self._leaving:
                self._store.capture(op.key, output, self._leaving[op.key])
            if op.key in self._stepped:
                on_reaching(roots_of(output), self._store.back(op.key), self._reached)

    def _backward(self, op: Op) -> None:
        self._stage.backward(op)
        if self._store is not None:
            self._store.consume(op.key)

    def _weight(self, op: Op) -> None:
        self._stage.weight(op)

    def _evict(self, op: Op) -> None:
        assert self._store is not None
        self._moved = self._store.evict(*_moved_by(op))

    def _evict_wait(self, op: Op) -> None:
        assert self._store is not None
        self._transfer_over(op, self._store.finish_evict(*_moved_by(op)))

    def _load(self, op: Op) -> None:
        assert self._store is not None
        self._moved = self._store.load(*_moved_by(op))

    def _load_wait(self, op: Op) -> None:
        assert self._store is not None
        self._transfer_over(op, self._store.finish_load(*_moved_by(op)))

    def _accept(self, op: Op) -> None:
        assert self._acceptor_end is not None
        self._acceptor_end.of(op.other).accept(op.part_key)

    def _give_back(self, op: Op) -> None:
        assert self._acceptor_end is not None
        self._acceptor_end.of(op.other).give_back(op.part_key)

    def _transfer_over(self, op: Op, transfer: TransferHandle) -> None:
        for observer in self._observers:
            observer.transfer_done(op, transfer)

    def _failure_note(self, failed: Op) -> str:
        at = next(i for i, op in enumerate(self._ops) if op is failed)
        first, last = max(0, at - SHOWN_AROUND), at + SHOWN_AROUND + 1
        around = [str(op) for op in self._ops[first:last]]
        around[at - first] = f">>>{failed}<<<"
        before = "... " if first else ""
        after = " ..." if last < len(self._ops) else ""
        return (
            f"bpipe: {self._name} failed at {failed} (micro-batch {failed.key}) of its "
            f"schedule: {before}{' '.join(around)}{after}"
        )


def _bring_back(reached: Callable[[int], None], key: PartKey) -> None:
    reached(key.part or 0)


def _moved_by(transfer: Op) -> tuple[ActivationKey, int]:
    """Which part of which activation a transfer is of."""
    return transfer.key, transfer.moved[1]


def _until_its_end(groups: Iterator[tuple[Op, ...]]) -> Iterator[tuple[Op, ...]]:
    """What comes up to the last part of a backward, that one included."""
    for group in groups:
        yield group
        if group[0].kind is Kind.BACKWARD and group[0].part == 0:
            return
