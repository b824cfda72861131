"""Check one stage's line alone: order, pairing and the bound.

An activation's life, the states the runtime goes through as well::

    F          E            (EW)         L            (LW)         B
    -> RESIDENT -> EVICTING -> REMOTE -> LOADING -> RESIDENT -> CONSUMED

Where the backward is split, B leaves it DUE for its weight gradients and W consumes it.

Where an activation travels in parts each of them has such a life.  A backward may be written part
by part, ``B3/3 B3/2 B3/1 B3/0``: the latest layers first, nothing computed between, and each part
must be back before its own.

In a logical line a transfer is over when the computation after its E or L is over; in a lowered
line EW or LW says so, which must come after that computation and before the next one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Set
from typing import NoReturn

from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.lowering.routes import Activation, peer
from megatron_bpipe.schedule.ops import (
    HOST,
    MESSAGES,
    TRANSFERS,
    Kind,
    Op,
    Schedule,
    borrowers,
    lenders,
    microbatches,
    other_end,
    quantity,
)


class State(enum.Enum):
    """Where an activation is; the value completes "what F3 left is ..."."""

    RESIDENT = "resident"
    EVICTING = "on its way out"
    REMOTE = "remote"
    LOADING = "on its way back"
    DUE = "waiting for its W"
    CONSUMED = "consumed by its backward"


_WAITS = {Kind.EVICT_WAIT: Kind.EVICT, Kind.LOAD_WAIT: Kind.LOAD}
_WAIT_FOR = {kind: wait for wait, kind in _WAITS.items()}


class LineCheck:
    """Goes through one line; afterwards ``peak`` is what the stage held at most."""

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        known: Set[Activation],
        budget: int | None,
        room: Mapping[int, int],
    ) -> None:
        """``budget`` in units; ``room``: slots that each lender has (none: no bound)."""
        self._schedule, self._stage, self._p = schedule, stage, schedule.p
        self._line = schedule.stages[stage]
        self._known, self._budget, self._room = known, budget, room
        self._lenders = lenders(schedule, stage)
        self._borrowers = borrowers(schedule, stage)
        self._inner = 0 < stage < schedule.p - 1  # has a neighbour on either side, always
        self._split = any(op.kind is Kind.WEIGHT for op in self._line)
        self._parts = schedule.parts
        self._state: dict[Activation, State] = {}
        self._away: dict[tuple[Activation, int], State] = {}  # parts that are not simply there
        self._within: Op | None = None  # the last part of a backward that is not yet over
        self._begun: list[Op] = []  # E and L before the next computation
        self._unwaited: list[Op] = []  # E and L whose computation is over but not yet EW, LW
        self._seen: dict[Kind, set[Activation]] = {kind: set() for kind in MESSAGES}
        self._where: dict[tuple[Activation, int], int] = {}  # who has what was evicted
        self._lent = dict.fromkeys(self._lenders, 0)
        self._here = self.peak = 0

    def run(self) -> None:
        """Check all ops in order; raises ScheduleError marking the first that is wrong."""
        lowered = self._schedule.lowered
        for index, op in enumerate(self._line):
            kind = op.kind
            if op.part is not None or self._parts > 1:
                self._check_part(index, op)
            if kind is Kind.FORWARD or kind is Kind.BACKWARD or kind is Kind.WEIGHT:
                self._compute(index, op)
            elif kind is Kind.EVICT or kind is Kind.LOAD:
                self._transfer(index, op)
            elif not lowered:
                self._fail(index, f"{op} stands in a logical schedule: it belongs to lowered ones")
            elif kind in MESSAGES:
                self._message(index, op)
            elif kind in _WAITS:
                self._wait(index, op)
            elif not self._borrowers:
                self._fail(index, f"{op} stands on a stage that accepts nothing: remove it")
            elif other_end(self._schedule, self._stage, op) not in self._borrowers:
                self._fail(index, f"{op} is of a stage that borrows nothing here: remove it")
        self._end()

    def _fail(self, index: int | None, reason: str) -> NoReturn:
        raise ScheduleError(reason, self._schedule, self._stage, index)

    def _check_part(self, index: int, op: Op) -> None:
        """Transfers name a part exactly where activations are cut; so may backwards."""
        if op.kind in TRANSFERS and (op.part is None) is (self._parts > 1):
            self._fail(index, f"{op}: activations of this schedule travel in {self._parts} part(s)")
        if op.part is not None and op.kind not in TRANSFERS and op.kind is not Kind.BACKWARD:
            self._fail(index, f"{op}: only transfers and backwards have parts")
        if op.part is not None and op.part >= self._parts:
            self._fail(index, f"{op}: an activation has parts 0 to {self._parts - 1}")
        inside = self._within
        if inside is not None and op.kind not in TRANSFERS:
            wanted = inside._replace(part=(inside.part or 0) - 1)
            if op != wanted:
                self._fail(index, f"{op} stands inside a backward: {wanted} is next")
        elif inside is None and op.kind is Kind.BACKWARD and op.part not in (None, self._parts - 1):
            self._fail(index, f"{op} is not where a backward begins: the latest layers come first")

    def _compute(self, index: int, op: Op) -> None:
        activation, forward = op.activation, op.kind is Kind.FORWARD
        state = self._state.get(activation)
        last = op.kind is (Kind.WEIGHT if self._split else Kind.BACKWARD)
        if op.kind is Kind.WEIGHT and state is not State.DUE:
            self._fail(index, f"{op} must stand once, after {_name(Kind.BACKWARD, activation)}")
        if forward and state is not None:
            self._fail(index, f"{op} stands twice: keep one")
        if op.kind is Kind.BACKWARD:
            state = self._away_of(op) or state
        if op.kind is Kind.BACKWARD and state is not State.RESIDENT:
            what = _name(Kind.FORWARD, activation)
            was = f"before {what}" if state is None else f"while what {what} left is {state.value}"
            self._fail(index, f"{op} {was}: a backward needs its activations on this stage")
        if self._unwaited:
            transfer = self._unwaited[0]
            wait = transfer._replace(kind=_WAIT_FOR[transfer.kind])
            self._fail(index, f"{transfer} is not over when {op} starts: put {wait} before {op}")
        if self._schedule.lowered and op.kind is not Kind.WEIGHT:
            receive = Kind.RECV_FORWARD if forward else Kind.RECV_BACKWARD
            if activation not in self._seen[receive] and self._exchanged(receive, op):
                self._fail(index, f"{op} before what it computes on: put {receive.value} before it")
        self._here += self._parts * forward
        if self._begun:
            loads = sum(transfer.kind is Kind.LOAD for transfer in self._begun)
            self._here += loads
            for transfer in self._begun:
                if transfer.kind is Kind.EVICT:
                    self._lent[self._lender(transfer)] += 1
        self._check_bound(index, op)
        self._within = op if op.part else None
        if not op.part:
            done = State.CONSUMED if last else State.DUE
            self._state[activation] = State.RESIDENT if forward else done
        self._here -= last * (self._parts if op.part is None else 1)
        if self._begun:
            self._unwaited, self._begun = self._begun, []
            if not self._schedule.lowered:
                for transfer in self._unwaited:
                    self._over(transfer)
                self._unwaited = []

    def _away_of(self, op: Op) -> State | None:
        """Where what this backward needs is; None: nothing of it is away."""
        if not self._away:
            return None
        parts = range(self._parts) if op.part is None else (op.part,)
        states = (self._away.get((op.activation, part)) for part in parts)
        return next((state for state in states if state is not None), None)

    def _check_bound(self, index: int, op: Op) -> None:
        self.peak = max(self.peak, self._here)
        if self._budget is not None and self._here > self._budget:
            self._fail(
                index,
                f"{self._count(self._here)} micro-batches on this stage during {op}, the budget is "
                f"{self._count(self._budget)}: evict one before",
            )
        for lender, room in self._room.items():
            if self._lent[lender] > room:
                self._fail(
                    index,
                    f"{self._lent[lender]} slots of {self._called(lender)} in use during {op}, it "
                    f"can lend {room}: load one before",
                )

    def _count(self, units: int) -> str:
        return quantity(microbatches(units, self._schedule.grain))

    def _transfer(self, index: int, op: Op) -> None:
        wanted, then = (
            (State.RESIDENT, State.EVICTING)
            if op.kind is Kind.EVICT
            else (State.REMOTE, State.LOADING)
        )
        if self._lender(op) not in self._lenders:
            self._fail(index, self._not_lent(op))
        state = self._away.get(op.moved) or self._state.get(op.activation)
        inside = self._within
        if inside is not None and op.activation == inside.activation:
            state = State.CONSUMED if op.moved[1] >= inside.moved[1] else state
        if state is not wanted:
            what = _name(Kind.FORWARD, op.activation)
            was = f"before {what}" if state is None else f"while what {what} left is {state.value}"
            self._fail(index, f"{op} {was}: it must be {wanted.value}")
        if op.kind is Kind.EVICT:
            self._where[op.moved] = self._lender(op)
        elif self._where[op.moved] != self._lender(op):
            where = _who(self._where[op.moved])
            self._fail(index, f"{op} from {_who(self._lender(op))}: it was evicted to {where}")
        self._away[op.moved] = then
        self._begun.append(op)

    def _wait(self, index: int, op: Op) -> None:
        for transfer in self._unwaited:
            same = (transfer.moved, transfer.other) == (op.moved, op.other)
            if transfer.kind is _WAITS[op.kind] and same:
                self._unwaited.remove(transfer)
                self._over(transfer)
                return
        self._fail(
            index,
            f"{op} waits for nothing: it stands after the computation that follows "
            f"{op._replace(kind=_WAITS[op.kind])}",
        )

    def _lender(self, transfer: Op) -> int:
        return other_end(self._schedule, self._stage, transfer)

    def _called(self, lender: int) -> str:
        return "the partner" if self._schedule.loans is None else _who(lender)

    def _not_lent(self, op: Op) -> str:
        if self._schedule.loans is None:
            return f"{op} on stage {self._stage} of {self._p}: only stages below {self._p // 2}"
        return f"{op} on stage {self._stage}: {_who(self._lender(op))} lends it nothing"

    def _over(self, transfer: Op) -> None:
        if transfer.kind is Kind.EVICT:
            self._away[transfer.moved] = State.REMOTE
            self._here -= 1
        else:
            del self._away[transfer.moved]
            self._lent[self._lender(transfer)] -= 1

    def _message(self, index: int, op: Op) -> None:
        activation, kind = op.activation, op.kind
        seen = self._seen[kind]
        if activation in seen:
            self._fail(index, f"{op} stands twice: keep one")
        if not self._exchanged(kind, op):
            self._fail(index, f"{op} has no stage to go to or come from: remove it")
        state = self._state.get(activation)
        if kind is Kind.SEND_FORWARD and state is None:
            self._fail(index, f"{op} before its forward: there is nothing to send")
        if kind is Kind.SEND_BACKWARD and state not in (State.DUE, State.CONSUMED):
            self._fail(index, f"{op} before its backward: there is nothing to send")
        seen.add(activation)

    def _exchanged(self, kind: Kind, op: Op) -> bool:
        """Whether this stage exchanges this message of op's activation with another stage."""
        if self._inner:
            return True
        return peer(op._replace(kind=kind), self._stage, self._p, self._known) is not None

    def _end(self) -> None:
        """Nothing may be left over."""
        if self._begun:
            self._fail(None, f"{self._begun[0]} stands before no computation")
        if self._unwaited:
            self._fail(None, f"nothing waits for {self._unwaited[0]}")
        if self._within is not None:
            self._fail(
                None, f"{self._within._replace(part=(self._within.part or 0) - 1)} is missing"
            )
        for activation, state in self._state.items():
            if state is not State.CONSUMED:
                missing = Kind.WEIGHT if state is State.DUE else Kind.BACKWARD
                self._fail(None, f"{_name(missing, activation)} is missing")
        if not self._schedule.lowered:
            return
        for kind, seen in self._seen.items():
            if len(seen) == len(self._state):
                continue
            for op in (op for op in self._line if op.kind is Kind.FORWARD):
                if op.activation not in seen and self._exchanged(kind, op):
                    self._fail(None, f"{_name(kind, op.activation)} is missing")


def _name(kind: Kind, activation: Activation) -> str:
    microbatch, chunk, up = activation
    return f"{kind.value}{microbatch}{f'.{chunk}' if chunk else ''}{'~' if up else ''}"


def _who(lender: int) -> str:
    return "host memory" if lender == HOST else f"stage {lender}"
