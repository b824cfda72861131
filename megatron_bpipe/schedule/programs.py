"""From lines of ops to programs that ``execute`` can run.

Logical lines: a computation waits for the result it needs; nothing waits to be sent.  Lowered
lines, under the strictest reading a transport may have::

    SF  to the next stage        post, then wait until the matching RF is posted
    SF,RB adjacent; equal label  post all, then wait for all: one batched call
    E, L                         post; EW, LW wait until the acceptor posted its AC, RT
    AC                           wait for a free slot, post
    RT                           wait until E's data can be there, post

Messages between two stages, and transfers within a pair, match in the order they are posted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.lowering.batches import batch_size
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
    Direction,
    Kind,
    Op,
    Schedule,
    borrowers,
    lenders,
    other_end,
)
from megatron_bpipe.schedule.validation.occupancy import borrowed
from megatron_bpipe.schedule.validation.rendezvous import POST, Log, Program, execute

_TRANSFERS = frozenset((Kind.EVICT, Kind.LOAD, Kind.EVICT_WAIT, Kind.LOAD_WAIT))
_ANSWERS = frozenset((Kind.ACCEPT, Kind.RETURN))
_Pairs = dict[tuple[int, int], tuple[Log, Log]]  # by evictor, lender: the posts of each


def times(schedule: Schedule, transfers: bool = True) -> list[list[int]]:
    """For each stage and op the time at which it is over (unit time, all stages from 0).

    A computation takes one unit, with parts as many as an activation has.

    ``transfers=False`` leaves out E, L and their waits, AC and RT of a lowered schedule.
    Raises ScheduleError, marking where each stuck stage stands, for a schedule that deadlocks.
    """
    programs, over = _run(schedule, transfers)
    return [
        _op_times(len(line), program.ops, ended)
        for line, program, ended in zip(schedule.stages, programs, over, strict=True)
    ]


def check_deadlock(schedule: Schedule) -> None:
    """Raise ScheduleError, marking where each stuck stage stands, if the schedule deadlocks."""
    _run(schedule, transfers=True)


def _run(schedule: Schedule, transfers: bool) -> tuple[list[Program], list[list[int]]]:
    programs = lowered_programs(schedule, transfers) if schedule.lowered else _logical(schedule)
    over, stuck = execute(programs)
    if stuck:
        marks = {stage: programs[stage].ops[step] for stage, step in stuck.items()}
        first = min(marks)
        raise ScheduleError(
            "deadlock: none of the marked ops can proceed; one stands before what it waits for",
            schedule,
            first,
            marks[first],
            marks,
        )
    return programs, over


def _op_times(count: int, ops: Sequence[int], ended: Sequence[int]) -> list[int]:
    """The time of each op: that of its last step, or of the op before where it has none."""
    out = [0] * count
    for op, end in zip(ops, ended, strict=True):
        out[op] = end
    return list(accumulate(out, max))


def _logical(schedule: Schedule) -> list[Program]:
    """Programs of F and B."""
    p, known = schedule.p, known_activations(schedule)
    logs: dict[tuple[int, Kind], Log] = defaultdict(list)
    entry: dict[tuple[int, Kind, Activation], int] = {}  # which entry of its log a result is
    for stage, line in enumerate(schedule.stages):
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            results = (op.activation for op in line if op.kind is kind and not op.part)
            entry.update({(stage, kind, result): n for n, result in enumerate(results)})
    programs = []
    for stage, line in enumerate(schedule.stages):
        program = Program()
        for index, op in enumerate(line):
            kind = op.kind
            if kind is Kind.WEIGHT:
                _compute(program, index, op, schedule.parts)
            if kind is not Kind.FORWARD and kind is not Kind.BACKWARD:
                continue
            route = upstream if kind is Kind.FORWARD else downstream
            source = route((stage, op.activation), p, known)
            if source is not None:
                wanted = entry[source[0], kind, source[1]]
                program.add(index, logs[source[0], kind], wanted)
            _compute(program, index, op, schedule.parts)
            if not op.part:  # the last
                program.add(index, logs[stage, kind], POST)
        programs.append(program)
    return programs


def _compute(program: Program, index: int, op: Op, parts: int) -> None:
    """The steps of a computation: as many as an activation has parts, for one part of it one."""
    for _ in range(parts if op.part is None else 1):
        program.add(index, None, POST)


def lowered_programs(schedule: Schedule, transfers: bool = True) -> list[Program]:
    """Programs of all ops."""
    p, known = schedule.p, known_activations(schedule)
    channels: dict[tuple[int, int], tuple[Log, Log]] = defaultdict(lambda: ([], []))
    pairs: _Pairs = defaultdict(lambda: ([], []))
    programs = []
    for stage, line in enumerate(schedule.stages):
        messages = _Messages(stage, p, known, channels)
        moves: dict[int, list[tuple[Log, int]]] = {}
        if transfers:
            if any(lender != HOST for lender in lenders(schedule, stage)):
                moves |= _evictor_moves(schedule, stage, pairs)
            for evictor in borrowers(schedule, stage):
                moves |= _acceptor_moves(schedule, stage, evictor, *pairs[evictor, stage])
        programs.append(_lowered_line(line, messages, moves, schedule.parts))
    return programs


def _lowered_line(
    line: Sequence[Op],
    messages: _Messages,
    moves: Mapping[int, Sequence[tuple[Log, int]]],
    parts: int,
) -> Program:
    """One stage's program; ``moves`` has the (log, entry) steps of its transfers by op."""
    program = Program()
    logs, entries, ops = program.logs, program.entries, program.ops
    position = 0
    while position < len(line):
        kind = line[position].kind
        size = 1
        if kind is Kind.FORWARD or kind is Kind.BACKWARD or kind is Kind.WEIGHT:
            _compute(program, position, line[position], parts)
        elif kind in MESSAGES:
            size = batch_size(line, position)
            ends = [messages.next(line[position + k]) for k in range(size)]
            for k, (mine, _, _) in enumerate(ends):
                logs.append(mine)
                entries.append(POST)
                ops.append(position + k)
            for k, (_, theirs, number) in enumerate(ends):
                logs.append(theirs)
                entries.append(number)
                ops.append(position + k)
        else:
            for log, entry in moves.get(position, ()):
                program.add(position, log, entry)
        position += size
    return program


@dataclass(slots=True)
class _End:
    """A stage's end of one channel: its posts, the other side's, messages that passed so far."""

    mine: Log
    theirs: Log
    passed: int = 0


class _Messages:
    """All ends of one stage's channels."""

    def __init__(
        self,
        stage: int,
        p: int,
        known: Set[Activation],
        channels: dict[tuple[int, int], tuple[Log, Log]],
    ) -> None:
        self._stage, self._p, self._known = stage, p, known
        self._channels = channels  # (from, to) -> posts of the sender, posts of the receiver
        self._ends: dict[tuple[int, int], _End] = {}  # by channel
        self._always: dict[tuple[Kind, Direction], _End] = {}  # where the op's kind decides

    def next(self, op: Op) -> tuple[Log, Log, int]:
        """Where this message is posted, where the other side posts it, and its number there."""
        end = self._always.get((op.kind, op.direction)) or self._find(op)
        number = end.passed
        end.passed = number + 1
        return end.mine, end.theirs, number

    def _find(self, op: Op) -> _End:
        stage = self._stage
        other = peer(op, stage, self._p, self._known)
        if other is None:
            raise ValueError(f"stage {stage} of p = {self._p} exchanges {op} with no other stage")
        sends = op.kind is Kind.SEND_FORWARD or op.kind is Kind.SEND_BACKWARD
        channel = (stage, other) if sends else (other, stage)
        sent, received = self._channels[channel]
        end = _End(sent, received) if sends else _End(received, sent)
        end = self._ends.setdefault(channel, end)
        if 0 < stage < self._p - 1:
            self._always[op.kind, op.direction] = end
        return end


def _evictor_moves(
    schedule: Schedule, stage: int, pairs: _Pairs
) -> dict[int, list[tuple[Log, int]]]:
    """E, L: post.  EW, LW: wait until the lender has posted the same transfer."""
    moves: dict[int, list[tuple[Log, int]]] = {}
    number: dict[tuple[Activation, int], int] = {}  # of the latest transfer of each, on its pair
    started: dict[int, int] = defaultdict(int)  # by lender
    for index, op in enumerate(schedule.stages[stage]):
        if op.kind not in _TRANSFERS:
            continue
        lender = other_end(schedule, stage, op)
        if lender == HOST:
            continue
        mine, lenders_log = pairs[stage, lender]
        if op.kind is Kind.EVICT or op.kind is Kind.LOAD:
            moves[index] = [(mine, POST)]
            number[op.moved] = started[lender]
            started[lender] += 1
        else:
            moves[index] = [(lenders_log, number[op.moved])]
    return moves


def _acceptor_moves(
    schedule: Schedule, stage: int, evictor: int, evictors: Log, mine: Log
) -> dict[int, list[tuple[Log, int]]]:
    """AC: wait until a slot is free, post.  RT: wait until the data is there, post."""
    moves: dict[int, list[tuple[Log, int]]] = {}
    accepted: dict[tuple[Activation, int], int] = {}  # number of the latest AC of each part
    returned: list[int] = []  # numbers of all RTs
    posted = accepts = 0
    pool = borrowed(schedule, evictor, stage)
    for index, op in enumerate(schedule.stages[stage]):
        if op.kind not in _ANSWERS or other_end(schedule, stage, op) != evictor:
            continue
        if op.kind is Kind.ACCEPT:
            # The slot of an AC beyond the pool is the one that the oldest RT not yet used frees.
            free = [(evictors, returned[accepts - pool])] if accepts >= pool else []
            moves[index] = [*free, (mine, POST)]
            accepted[op.moved] = posted
            accepts += 1
        else:
            moves[index] = [(evictors, accepted[op.moved]), (mine, POST)]
            returned.append(posted)
        posted += 1
    return moves
