"""Proof that the pool's handshake ends, whatever collectives come before the first message.

The handshake as programs (see ``validation.rendezvous``): each stage of a pair has one that
computes and one of an agent beside it. ``runtime/transport/pair/handshake.py`` has the drawing, and
publishes and awaits what stands here, in this order::

    evictor's agent                         acceptor's agent
    post invitation                         wait invitation
    wait answer                             post answer
    post agreement                          wait agreement
    post identity, device                   post identity, device
    wait identity, device                   wait identity, device
    post trial                              wait trial
    wait offer                              post offer
    post transport                          wait transport
    meet in the pair's group                meet in the pair's group
    wait bytes (of its computing thread)
    post request                            wait request
                                            post pool
    wait pool
    post done                               post done

The computing thread of an evictor posts ``bytes`` when its first forward is over and waits for its
agent's ``done`` before its first E. That of an acceptor waits for ``done`` before its first
forward; AC and RT that stand before it are kept until then. With model chunks the first forward is
that of the last chunk.

Where a schedule has loans of its own they were worked out from an earlier iteration's bytes: the
agents know what to ask for and nobody posts ``bytes``. A lender then waits before its very first
forward or AC, and it does not matter whether it stands before or behind its evictor in the
pipeline. A stage may have several pairs, each with agents of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.ops import (
    HOST,
    MESSAGES,
    Kind,
    Op,
    Schedule,
    borrowers,
    lenders,
    other_end,
)
from megatron_bpipe.schedule.programs import lowered_programs
from megatron_bpipe.schedule.validation.rendezvous import POST, Log, Program, execute

EVICTOR, ACCEPTOR = "evictor", "acceptor"
COMPUTING = "computing thread"  # of the same rank


class Note(NamedTuple):
    """Something that is published once.

    Attributes:
        by: the end that publishes it, or its own computing thread.
        what: its name.
    """

    by: str
    what: str


def _both(what: str) -> tuple[Note, Note]:
    return Note(EVICTOR, what), Note(ACCEPTOR, what)


# What the agents publish and await, round by round; both post before they wait where both post.
TALK: tuple[tuple[Note, ...], ...] = (
    (Note(EVICTOR, "invitation"),),
    (Note(ACCEPTOR, "answer"),),
    (Note(EVICTOR, "agreement"),),
    _both("identity"),
    _both("device"),
    (Note(EVICTOR, "trial"),),
    (Note(ACCEPTOR, "offer"),),
    (Note(EVICTOR, "transport"),),
    _both("group"),
    (Note(COMPUTING, "bytes"),),
    (Note(EVICTOR, "request"),),
    (Note(ACCEPTOR, "pool"),),
)
Pair = tuple[int, int]  # evictor, acceptor
Logs = dict[tuple[Pair, str, str], Log]  # by pair, who posts, what
Before = dict[int, list[tuple[Log, int]]]  # steps by the op that they stand before


def check_handshake(schedule: Schedule) -> None:
    """Raise ScheduleError if the first iteration of a lowered schedule may hang in the handshake.

    Two collectives of all stages are in the way: one when the iteration begins (a timer's barrier)
    and one at each stage's first message (NCCL builds a group's communicator then).
    """
    stuck = run_handshake(schedule, [[0, first_message(line)] for line in schedule.stages])
    if stuck:
        stage = min(stuck)
        raise ScheduleError(
            "deadlock: the marked ops wait for the pool of evicted activations, or for a stage "
            "that does",
            schedule,
            stage,
            stuck[stage],
            stuck,
        )


def first_message(line: Sequence[Op]) -> int:
    """Where the first message of a stage stands, or its end."""
    return next((i for i, op in enumerate(line) if op.kind in MESSAGES), len(line))


def first_forward(line: Sequence[Op], any_chunk: bool = False) -> int:
    """Where the first forward of a stage's last chunk stands: then all sizes are known.

    With ``any_chunk`` its very first, or its first AC where that comes before it.
    """
    if any_chunk:
        return next(i for i, op in enumerate(line) if op.kind in (Kind.FORWARD, Kind.ACCEPT))
    last = max(op.chunk for op in line)
    return next(i for i, op in enumerate(line) if op.kind is Kind.FORWARD and op.chunk == last)


def run_handshake(
    schedule: Schedule,
    collectives: Sequence[Sequence[int]],
    acceptor_waits: Callable[[Sequence[Op]], int] = first_forward,
) -> dict[int, int]:
    """Run the first iteration; returns the op at which each stuck stage waits for ever.

    Args:
        schedule: lowered.
        collectives: for each stage before which of its ops it enters a collective of all stages;
            as many on each.
        acceptor_waits: before which of its ops an acceptor waits for the pool; another than the
            runtime's shows what would come of it.
    """
    programs = handshake_programs(schedule, collectives, acceptor_waits)
    _, stuck = execute(programs)
    lengths = [len(line) for line in schedule.stages]
    return {
        stage: min(programs[stage].ops[step], lengths[stage] - 1)
        for stage, step in stuck.items()
        if stage < schedule.p  # not the agents
    }


def handshake_programs(
    schedule: Schedule,
    collectives: Sequence[Sequence[int]],
    acceptor_waits: Callable[[Sequence[Op]], int] = first_forward,
) -> list[Program]:
    """The stages' programs, then the agents'; arguments as for `run_handshake`."""
    logs: Logs = defaultdict(list)
    rooms: dict[tuple[int, int], Log] = defaultdict(list)  # by collective, stage
    programs, agents = [], []
    for stage, base in enumerate(lowered_programs(schedule)):
        line = schedule.stages[stage]
        before: Before = defaultdict(list)
        kept_until = 0
        known = schedule.loans is not None
        for lender in pairs_of(schedule, stage):
            pair = stage, lender
            if not known:
                before[first_forward(line) + 1].append((logs[pair, COMPUTING, "bytes"], POST))
            first = next(i for i, op in enumerate(line) if _evicts(schedule, stage, op, lender))
            before[first].append((logs[pair, EVICTOR, "done"], 0))
            agents += [_agent(pair, end, logs, known) for end in (EVICTOR, ACCEPTOR)]
        for evictor in borrowers(schedule, stage):
            if stage in pairs_of(schedule, evictor):
                kept_until = first_forward(line, any_chunk=True) if known else acceptor_waits(line)
                before[kept_until].append((logs[(evictor, stage), ACCEPTOR, "done"], 0))
        for number, at in enumerate(collectives[stage]):
            before[at].append((rooms[number, stage], POST))
            before[at] += [(rooms[number, each], 0) for each in range(schedule.p)]
        programs.append(_with(base, before, kept_until, line))
    return programs + agents


def pairs_of(schedule: Schedule, stage: int) -> tuple[int, ...]:
    """The stages to which this one really evicts."""
    used = {
        other_end(schedule, stage, op) for op in schedule.stages[stage] if op.kind is Kind.EVICT
    }
    return tuple(y for y in lenders(schedule, stage) if y in used and y != HOST)


def said_by(end: str, known: bool = False) -> Iterator[tuple[bool, Note]]:
    """What an end's agent posts (True) and waits for, in its order.

    ``known``: the bytes are, so that it does not wait for its computing thread.
    """
    for notes in TALK:
        for note in sorted(notes, key=lambda note: note.by != end):
            if note.by != COMPUTING or (end == EVICTOR and not known):
                yield note.by == end, note


def _evicts(schedule: Schedule, stage: int, op: Op, lender: int) -> bool:
    return op.kind is Kind.EVICT and other_end(schedule, stage, op) == lender


def _agent(pair: Pair, end: str, logs: Logs, known: bool) -> Program:
    """What an agent does, from its rank's first iteration on."""
    program = Program()
    for posts, note in said_by(end, known):
        program.add(0, logs[pair, note.by, note.what], POST if posts else 0)
    program.add(0, logs[pair, end, "done"], POST)
    return program


def _with(base: Program, before: Before, kept_until: int, line: Sequence[Op]) -> Program:
    """A stage's program with steps put before ops; AC and RT before ``kept_until`` come there."""
    program = Program()
    kept: list[tuple[Log, int]] = []
    reached = 0

    def reach(op: int) -> None:
        nonlocal reached
        for at in range(reached, op + 1):
            steps = [*before.get(at, ()), *(kept if at == kept_until else ())]
            for log, entry in steps:
                program.add(at, log, entry)
        reached = max(reached, op + 1)

    for log, entry, op in zip(base.logs, base.entries, base.ops, strict=True):
        if op < kept_until and line[op].kind in (Kind.ACCEPT, Kind.RETURN):
            assert log is not None
            kept.append((log, entry))
        else:
            reach(op)
            program.add(op, log, entry)
    reach(len(line))
    return program
