"""Lowering: spell out messages, the ends of transfers, and the acceptor's part.

Stages 1 and 0 of p = 4 in BPipe's budget, from the start::

    logical 1   F0           F1           F2           B0            F3 ...
    lowered 1   RF0,F0,SF0,  RF1,F1,SF1,  RF2,F2,SF2,  RB0,B0,SB0,   RF3,F3,SF3, ...

    logical 0   F0      F1      E1,F2          F3       E3,B0           L1,F4 ...
    lowered 0   F0,SF0, F1,SF1, E1,F2,EW1,SF2, F3,SF3,  RB0,E3,B0,EW3,  L1,F4,LW1,SF4, ...

For schedules that compute in 1F1B's order these are exactly Megatron-LM's messages, in its order
and number: every computation is preceded by its receive and followed by its send.  All others post
their messages by time label (`exchanges`), which no schedule can deadlock.  1F1B by labels would
be right too, but would merge calls that Megatron makes one after the other in warm-up and
cool-down.
A transfer is over right after its computation, before that computation's sends: ``E3,F4,EW3,SF4``.
A backward that is written part by part has its receive before the first and its send after the
last: ``RB3,L3/1,B3/1,LW3/1,B3/0,SB3``.

`answers` places the acceptor's part.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.lowering.answers import answers, with_answers
from megatron_bpipe.schedule.lowering.batches import batches
from megatron_bpipe.schedule.lowering.exchanges import exchanges, merge
from megatron_bpipe.schedule.lowering.routes import Activation, known_activations, peer
from megatron_bpipe.schedule.ops import UP, Kind, Op, Schedule, borrowers
from megatron_bpipe.schedule.programs import times

__all__ = ["batches", "lower"]


def lower(schedule: Schedule, answered: bool = True) -> Schedule:
    """The lowered form of a logical schedule.

    ``answered=False`` leaves AC and RT out, which transports that are one-sided do not need.

    Raises ValueError if it is lowered already, ScheduleError if its messages deadlock so that the
    acceptors' ops cannot be placed.
    """
    if schedule.lowered:
        raise ValueError(f"{schedule.name} is lowered already: give the logical schedule")
    lines = _as_megatron(schedule) if in_1f1b_order(schedule) else _by_label(schedule)
    lowered = replace(schedule, stages=tuple(lines), lowered=True)
    evicts = any(op.kind is Kind.EVICT for line in schedule.stages for op in line)
    if schedule.to_host or not evicts or not answered:
        return lowered
    over = times(lowered, transfers=False)
    whole = list(lines)
    for acceptor in range(schedule.p):
        posted = [
            one
            for stage in borrowers(schedule, acceptor)
            for one in answers(schedule, stage, acceptor, lines[stage], over[stage])
        ]
        if posted:
            posted.sort(key=lambda one: one[0])
            whole[acceptor] = with_answers(lines[acceptor], over[acceptor], posted)
    return replace(lowered, stages=tuple(whole))


def in_1f1b_order(schedule: Schedule) -> bool:
    """Whether every stage computes in the order of 1F1B; weight versions do not matter."""
    if any(op.chunk or op.direction is UP for op in schedule.stages[0]):
        return False
    base = one_f_one_b(schedule.p, schedule.microbatches)
    return all(
        [(op.kind, op.microbatch) for op in line if op.kind.computation and not op.part]
        == [(op.kind, op.microbatch) for op in stock]
        for line, stock in zip(schedule.stages, base.stages, strict=True)
    )


def _by_label(schedule: Schedule) -> list[tuple[Op, ...]]:
    """Every line with time-labelled messages and the ends of transfers."""
    lines = []
    ends = times(schedule)
    for line, over, posted in zip(schedule.stages, ends, exchanges(schedule, ends), strict=True):
        lines.append(with_waits(merge(line, over, posted)))
    return lines


def with_waits(line: Sequence[Op]) -> tuple[Op, ...]:
    """A line with EW and LW behind the computations beside which E and L run."""
    out: list[Op] = []
    transfers: list[Op] = []
    for op in line:
        out.append(op)
        if op.kind is Kind.EVICT or op.kind is Kind.LOAD:
            transfers.append(op)
        elif op.kind.computation:
            out += map(_wait, transfers)
            transfers.clear()
    return tuple(out)


def _as_megatron(schedule: Schedule) -> list[tuple[Op, ...]]:
    """Every line with Megatron's messages and the ends of transfers."""
    known = known_activations(schedule)
    around: _Around = {}
    return [
        _with_messages(line, stage, schedule, known, around)
        for stage, line in enumerate(schedule.stages)
    ]


# (forward, activation, version) -> the receive before and the send after that computation.
_Around = dict[tuple[bool, Activation, int | None], tuple[Op, Op]]


def _with_messages(
    line: Sequence[Op], stage: int, schedule: Schedule, known: Set[Activation], around: _Around
) -> tuple[Op, ...]:
    """One line with RF, SF, RB, SB, EW and LW; equal ops of all lines are one object."""
    out: list[Op] = []
    transfers: list[Op] = []
    p, parts = schedule.p, schedule.parts
    inner = 0 < stage < p - 1
    for op in line:
        if op.kind is Kind.EVICT or op.kind is Kind.LOAD:
            transfers.append(op)
            continue
        if op.kind is Kind.WEIGHT:
            out += (*transfers, op, *map(_wait, transfers))
            transfers.clear()
            continue
        forward = op.kind is Kind.FORWARD
        key = (forward, op.activation, op.version)
        if key not in around:
            around[key] = (
                op._replace(kind=Kind.RECV_FORWARD if forward else Kind.RECV_BACKWARD, part=None),
                op._replace(kind=Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD, part=None),
            )
        receive, send = around[key]
        begins, ends = op.part in (None, parts - 1), not op.part  # of a backward part by part
        if begins and (inner or peer(receive, stage, p, known) is not None):
            out.append(receive)
        if transfers:
            out += (*transfers, op, *map(_wait, transfers))
            transfers.clear()
        else:
            out.append(op)
        if ends and (inner or peer(send, stage, p, known) is not None):
            out.append(send)
    return tuple(out)


def _wait(transfer: Op) -> Op:
    return transfer._replace(
        kind=Kind.EVICT_WAIT if transfer.kind is Kind.EVICT else Kind.LOAD_WAIT
    )
