r"""Messages with time labels: one rule that frees every schedule of deadlocks by construction.

The schedule is run in unit time.  A message is labelled with the time at which the computation that
makes it ends.  Each rank posts all its messages of one label together (an *exchange*), after its
computations that end by then and before those that start then.  p = 2, two chunks, m = 2::

    time         1     2     3     4     5     6     7  ...
    stage 0     F0    F1    F0.1  F1.1   .   B0.1
                  |     | \   |
    stage 1       .   F0    F1   F0.1  B0.1  F1.1 ...

    stage 0     F0 SF0:1 F1 (RF0.1:2 SF1:2) F0.1 (RF1.1:3 SF0.1:3) F1.1 ...

Why it cannot deadlock, even if every exchange waits until all its messages have been met by their
other side: both sides give a message the same label, and every rank posts its labels in rising
order.  Take the lowest label that is not over.  Whoever it waits for has only lower labels before
it, which are over, so it gets there.

Within an exchange the order is that of the receiver's names, forwards first, so that two messages
between the same two ranks (p = 2, where both neighbours are one rank) match in order too.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.schedule.lowering.routes import (
    Activation,
    downstream,
    known_activations,
    upstream,
)
from megatron_bpipe.schedule.ops import DOWN, UP, Kind, Op, Schedule

_Sorted = tuple[int, bool, Activation, bool, Op]  # label, backward, receiver's name, sends


def exchanges(schedule: Schedule, ends: Sequence[Sequence[int]]) -> list[list[Op]]:
    """Every stage's messages with their labels, in the order in which they are posted.

    ``ends`` has the time at which each op of each stage ends (`programs.times`).
    """
    p, known = schedule.p, known_activations(schedule)
    versions = [
        {op.activation: op.version for op in line if op.kind is Kind.FORWARD}
        for line in schedule.stages
    ]
    posted: list[list[_Sorted]] = [[] for _ in range(p)]
    for stage, (line, over) in enumerate(zip(schedule.stages, ends, strict=True)):
        for op, end in zip(line, over, strict=True):
            if op.kind is Kind.FORWARD:
                target = downstream((stage, op.activation), p, known)
                kinds = Kind.SEND_FORWARD, Kind.RECV_FORWARD
            elif op.kind is Kind.BACKWARD and not op.part:
                target = upstream((stage, op.activation), p, known)
                kinds = Kind.SEND_BACKWARD, Kind.RECV_BACKWARD
            else:
                continue
            if target is None or target[0] == stage:
                continue
            backward = op.kind is Kind.BACKWARD
            other, (microbatch, chunk, up) = target
            way, version = UP if up else DOWN, versions[other].get(target[1])
            send = op._replace(kind=kinds[0], label=end, part=None)
            receive = Op(kinds[1], microbatch, chunk, way, version, end)
            posted[stage].append((end, backward, target[1], True, send))
            posted[other].append((end, backward, target[1], False, receive))
    return [[entry[-1] for entry in sorted(line, key=lambda e: e[:-1])] for line in posted]


def merge(line: Sequence[Op], over: Sequence[int], messages: Sequence[Op]) -> tuple[Op, ...]:
    """One stage's line with each exchange after the last computation that ends by its label.

    ``over`` has the time at which each op of ``line`` ends.
    """
    out: list[Op] = []
    transfers: list[Op] = []  # E and L stay directly before the computation they run beside
    at = 0
    for op, end in zip(line, over, strict=True):
        if op.kind.computation:
            while at < len(messages) and _label(messages[at]) < end:
                out.append(messages[at])
                at += 1
            out += (*transfers, op)
            transfers.clear()
        elif op.kind is Kind.EVICT or op.kind is Kind.LOAD:
            transfers.append(op)
        else:
            out.append(op)
    return (*out, *messages[at:])


def _label(message: Op) -> int:
    assert message.label is not None
    return message.label
