"""Prove that a schedule can run, within its bound.

What is checked, for logical and lowered schedules alike:

* every stage runs F and B of every micro-batch once, F first, each after the stage it needs, and
  where the backward is split W of each once after its B;
* every op of a micro-batch has the version of the weights that its forward has;
* E and L only on evictors and to those who lend to them, E of what is resident, L of
  what is remote, B of what is back;
* no stage holds more than the budget, transfers in flight counted on both sides, under any
  relative timing: acceptor's own peak + most slots ever in use <= budget;

and for lowered ones

* messages are complete and match in the order they are posted;
* each lender posts its receives and returns in the order of its evictor's E and L;
* nothing deadlocks when every message waits for its other side (see ``programs``).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence, Set
from typing import NoReturn

from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.lowering.answers import answer as as_answer
from megatron_bpipe.schedule.lowering.routes import (
    Activation,
    downstream,
    known_activations,
    peer,
    upstream,
)
from megatron_bpipe.schedule.ops import (
    HOST,
    MESSAGES,
    UP,
    Direction,
    Kind,
    Op,
    Schedule,
    lenders,
    other_end,
    units,
)
from megatron_bpipe.schedule.programs import check_deadlock
from megatron_bpipe.schedule.validation.occupancy import transfers_with
from megatron_bpipe.schedule.validation.stage_ops import LineCheck

__all__ = ["ScheduleError", "validate"]


def validate(schedule: Schedule, budget: float | None = None) -> None:
    """Raise ScheduleError, the schedule printed with the failing op marked, if anything is wrong.

    ``budget`` (micro-batches of a whole stage) defaults to the schedule's own; if that is None too
    no bound is checked.
    """
    if budget is None:
        budget = schedule.budget
    _check_computations(schedule)
    known = known_activations(schedule)
    most = None if budget is None else units(budget, schedule.grain)
    peaks: dict[int, int] = {}
    if schedule.loans is not None:
        _check_loans(schedule)
    for stage in reversed(range(schedule.p)):  # acceptors first: what they hold bounds the pool
        room: dict[int, int] = {}
        if schedule.loans is not None:
            most = schedule.keeps[stage]
            room = {loan.lender: loan.slots for loan in schedule.loans if loan.evictor == stage}
        elif most is not None and not schedule.to_host:
            lent_by = (y for y in lenders(schedule, stage) if y in peaks)
            room = {lender: most - peaks[lender] for lender in lent_by}
        check = LineCheck(schedule, stage, known, most, room)
        check.run()
        peaks[stage] = check.peak
    _check_versions(schedule)
    if schedule.lowered:
        _check_messages(schedule)
        for stage in range(schedule.p):
            for lender in lenders(schedule, stage):
                if lender != HOST:
                    _check_answers(schedule, stage, lender)
    check_deadlock(schedule)


def _check_computations(schedule: Schedule) -> None:
    """All stages compute the same activations, of m micro-batches, from chunk 0 on."""
    if not schedule.stages:
        raise ScheduleError("there is no stage: a schedule has at least 1", schedule)
    if schedule.microbatches < 1:
        raise ScheduleError(f"m is {schedule.microbatches}: an iteration has at least 1", schedule)
    known = known_activations(schedule)
    for stage, line in enumerate(schedule.stages):
        here = {op.activation for op in line if op.kind is Kind.FORWARD}
        if here == known:
            continue
        for index, op in enumerate(line):
            if op.kind is Kind.FORWARD and op.activation not in known:
                raise ScheduleError("stage 0 does not compute this", schedule, stage, index)
        lost = next(op for op in schedule.stages[0] if op.activation in known - here)
        raise ScheduleError(f"{lost} is missing, stage 0 has it", schedule, stage)
    for index, op in enumerate(schedule.stages[0]):
        if op.microbatch >= schedule.microbatches:
            reason = f"{op}, but the schedule has {schedule.microbatches} micro-batches from 0"
            raise ScheduleError(reason, schedule, 0, index)
        below = (op.microbatch, op.chunk - 1)
        if op.chunk and not {(*below, False), (*below, True)} & known:
            raise ScheduleError(f"{op} has no chunk {op.chunk - 1} before it", schedule, 0, index)
    missing = set(range(schedule.microbatches)) - {activation[0] for activation in known}
    if missing:
        raise ScheduleError(f"micro-batch {min(missing)} is missing", schedule)


def _check_versions(schedule: Schedule) -> None:
    """A micro-batch's backward uses the weights that its forward used, on each stage."""
    if all(op.version is None for line in schedule.stages for op in line):
        return
    answers = (Kind.ACCEPT, Kind.RETURN)  # these are about the partner's micro-batches
    used: list[dict[Activation, int | None]] = []
    for line in schedule.stages:
        used.append({op.activation: op.version for op in line if op.kind is Kind.FORWARD})
    for stage, line in enumerate(schedule.stages):
        for index, op in enumerate(line):
            whose = other_end(schedule, stage, op) if op.kind in answers else stage
            right = used[whose].get(op.activation)
            if op.version != right:
                named = "no version" if right is None else f"version {right}"
                reason = f"{op}, but its forward on stage {whose} uses {named} of the weights"
                raise ScheduleError(reason, schedule, stage, index)


# Forward?, then the activation it is for, as the receiver calls it.
_Message = tuple[bool, int, int, bool]


def _check_messages(schedule: Schedule) -> None:
    """Between any two stages, the n-th message sent is the n-th received."""
    p, known = schedule.p, known_activations(schedule)
    sent: dict[tuple[int, int], list[_Message]] = defaultdict(list)  # by (from, to)
    received: dict[tuple[int, int], list[_Message]] = defaultdict(list)
    for stage, line in enumerate(schedule.stages):
        always: dict[tuple[Kind, Direction], list[_Message]] = {}  # where the kind decides
        for op in line:
            kind, direction = op.kind, op.direction
            if kind not in MESSAGES:
                continue
            messages = always.get((kind, direction))
            if messages is None:
                channel, sends = _channel(op, stage, p, known)
                messages = (sent if sends else received)[channel]
                if 0 < stage < p - 1:
                    always[kind, direction] = messages
                elif sends:
                    messages.append(_as_received(op, stage, p, known))
                    continue
            forward = kind is Kind.SEND_FORWARD or kind is Kind.RECV_FORWARD
            messages.append((forward, op.microbatch, op.chunk, direction is UP))
    for channel in sent:
        if sent[channel] != received[channel]:
            _fail_at_mismatch(schedule, channel, sent[channel], received[channel])


def _channel(op: Op, stage: int, p: int, known: Set[Activation]) -> tuple[tuple[int, int], bool]:
    """Between which stages (from, to) this message goes, and whether this stage sends it."""
    other = peer(op, stage, p, known)
    assert other is not None, "LineCheck refuses messages that no other stage exchanges"
    sends = op.kind is Kind.SEND_FORWARD or op.kind is Kind.SEND_BACKWARD
    return ((stage, other) if sends else (other, stage)), sends


def _as_received(op: Op, stage: int, p: int, known: Set[Activation]) -> _Message:
    """A message as the receiver calls it: another chunk, perhaps, at the ends of the pipeline."""
    forward = op.kind is Kind.SEND_FORWARD
    place = (downstream if forward else upstream)((stage, op.activation), p, known)
    assert place is not None, "a message has a place to go to"
    return (forward, *place[1])


def _fail_at_mismatch(
    schedule: Schedule,
    channel: tuple[int, int],
    sent: Sequence[_Message],
    received: Sequence[_Message],
) -> NoReturn:
    """Mark the first message that is not what the receiver takes it for."""
    number = next(
        n for n, (here, there) in enumerate(zip(sent, received, strict=True)) if here != there
    )
    known = known_activations(schedule)
    places = []
    for stage, sending in zip(channel, (True, False), strict=True):
        line = schedule.stages[stage]
        mine = (
            index
            for index, op in enumerate(line)
            if op.kind in MESSAGES and _channel(op, stage, schedule.p, known) == (channel, sending)
        )
        places.append(next(itertools.islice(mine, number, None)))
    source, target = channel
    raise ScheduleError(
        f"message {number} from stage {source} to stage {target} is sent as "
        f"{schedule.stages[source][places[0]]} and received as "
        f"{schedule.stages[target][places[1]]}: post both sides in the same order",
        schedule,
        target,
        places[1],
        {source: places[0]},
    )


def _check_loans(schedule: Schedule) -> None:
    """Loans that can be: no stage lends what it has borrowed, and each says how much stays."""
    loans, p = schedule.loans or (), schedule.p
    if len(schedule.keeps) != p:
        raise ScheduleError(f"bounds of {len(schedule.keeps)} stages: give {p}", schedule)
    evictors = {loan.evictor for loan in loans}
    pairs = {(loan.evictor, loan.lender) for loan in loans}
    if len(pairs) < len(loans):
        raise ScheduleError("a stage lends twice to the same stage: add the slots", schedule)
    for loan in loans:
        for stage in (loan.evictor, loan.lender):
            if not 0 <= stage < p and stage != HOST:
                raise ScheduleError(f"{loan}: there are stages 0 to {p - 1}", schedule)
        if loan.slots < 1:
            raise ScheduleError(f"{loan}: lend at least 1 slot", schedule, loan.evictor)
        if loan.lender in evictors:
            reason = f"stage {loan.lender} lends to stage {loan.evictor} and evicts: do one of both"
            raise ScheduleError(reason, schedule, loan.lender)


def _check_answers(schedule: Schedule, evictor: int, acceptor: int) -> None:
    """The acceptor's AC and RT are the evictor's E and L, in the same order."""
    asked = [
        as_answer(schedule, evictor, op)
        for op in transfers_with(schedule, evictor, acceptor)
        if op.kind is Kind.EVICT or op.kind is Kind.LOAD
    ]
    answers = [
        (index, op)
        for index, op in enumerate(schedule.stages[acceptor])
        if (op.kind is Kind.ACCEPT or op.kind is Kind.RETURN)
        and other_end(schedule, acceptor, op) == evictor
    ]
    for wanted, answer in itertools.zip_longest(asked, answers):
        if answer is None:
            raise ScheduleError(f"{wanted} is missing", schedule, acceptor)
        index, op = answer
        if op != wanted:
            should = "nothing" if wanted is None else wanted
            reason = f"{op} answers no transfer of stage {evictor}: {should} is next in its order"
            raise ScheduleError(reason, schedule, acceptor, index)
