"""From lines of lowered ops to the steps that the engine runs, and what these cost.

A step is a tuple (code, index of its op, what the code needs):

=========  ==================================================================
COMPUTE    which of the stage's `seconds_of` it takes
MESSAGE    ends of messages: one, or all of a batched call
START      number of the transfer that E or L starts
WAIT       number of the transfer that EW or LW waits for
NOTHING    AC and RT: the transports are one-sided; posting a labelled receive
=========  ==================================================================

Messages with time labels are posted and not waited for (``Schedule.labelled``): the step that waits
for a receive stands directly before the computation that needs it.

Steps depend on the schedule alone, so one that is simulated with many costs is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_bpipe.schedule.lowering.batches import batch_size
from megatron_bpipe.schedule.lowering.routes import (
    Activation,
    downstream,
    known_activations,
    upstream,
)
from megatron_bpipe.schedule.ops import HOST, MESSAGES, UP, Kind, Op, Schedule, other_end
from megatron_bpipe.simulate.costs import StageCosts
from megatron_bpipe.simulate.network import Network, Path

COMPUTE, MESSAGE, START, WAIT, NOTHING = range(5)
Step = tuple[int, int, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A transfer: which op of which stage."""

    stage: int
    op: Op


@dataclass(frozen=True, slots=True)
class Copy:
    """What a transfer costs: how its bytes go, fixed seconds, bytes."""

    path: Path
    fixed: float
    size: int


@dataclass(frozen=True)
class Compiled:
    """Steps of every stage, all transfers, and per message from which stage to which it goes."""

    steps: list[list[Step]]
    jobs: list[Job]
    senders: list[int]
    receivers: list[int]


@lru_cache(maxsize=16)
def compile_steps(schedule: Schedule) -> Compiled:
    """Raises ValueError unless the schedule is lowered."""
    if not schedule.lowered:
        raise ValueError(f"{schedule.name} is not lowered: simulate what lower() returns")
    numbers = _Numbers(schedule)
    jobs: list[Job] = []
    steps = [_line_steps(schedule, stage, numbers, jobs) for stage in range(schedule.p)]
    return Compiled(steps, jobs, numbers.senders, numbers.receivers)


def seconds_of(schedule: Schedule, costs: StageCosts) -> list[float]:
    """Seconds of each kind of computation and chunk of a stage: whole ones, then their parts."""
    backward = tuple(s + costs.recompute for s in costs.backward)
    whole = [
        table[chunk if chunk < len(table) else -1]
        for table in (costs.forward, backward, costs.weight)
        for chunk in range(schedule.chunks)
    ]
    return [*whole, *(seconds / schedule.parts for seconds in whole)]


def copy_of(job: Job, schedule: Schedule, costs: StageCosts, network: Network) -> Copy:
    """What this transfer costs on these links."""
    out = job.op.kind is Kind.EVICT
    other = other_end(schedule, job.stage, job.op)
    if other == HOST:
        path = network.host_path(job.stage, out=out)
    else:
        path = network.path(job.stage, other) if out else network.path(other, job.stage)
    fixed = costs.evict if out else costs.load
    return Copy(path, fixed / schedule.parts, costs.moved // schedule.parts)


class _Numbers:
    """Numbers the messages: (receiver, forward, activation as the receiver calls it)."""

    def __init__(self, schedule: Schedule) -> None:
        self.p = schedule.p
        self.known = known_activations(schedule)
        self.forward: list[dict[Activation, int]] = [{} for _ in range(self.p)]
        self.backward: list[dict[Activation, int]] = [{} for _ in range(self.p)]
        self.senders: list[int] = []
        self.receivers: list[int] = []

    def number(self, op: Op, stage: int) -> int:
        """The message's number, the same at both ends."""
        kind, activation = op.kind, op.activation
        if kind is Kind.RECV_FORWARD or kind is Kind.RECV_BACKWARD:
            receiver = stage
            sender = -1
        else:
            sender = stage
            ahead = kind is Kind.SEND_FORWARD
            receiver = stage + 1 if ahead is not (op.direction is UP) else stage - 1
            if not 0 <= receiver < self.p:
                route = downstream if ahead else upstream
                place = route((stage, activation), self.p, self.known)
                assert place is not None, f"{op} of stage {stage} goes nowhere"
                receiver, activation = place
        forward = kind is Kind.SEND_FORWARD or kind is Kind.RECV_FORWARD
        table = (self.forward if forward else self.backward)[receiver]
        number = table.get(activation)
        if number is None:
            number = table[activation] = len(self.receivers)
            self.receivers.append(receiver)
            self.senders.append(sender)
        elif sender >= 0:
            self.senders[number] = sender
        return number


def _line_steps(schedule: Schedule, stage: int, numbers: _Numbers, jobs: list[Job]) -> list[Step]:
    line, parts = schedule.stages[stage], schedule.parts
    chunks, labelled = schedule.chunks, schedule.labelled
    started: dict[tuple[Kind, tuple[Activation, int]], int] = {}
    needed = _receives_of(line) if labelled else {}
    out: list[Step] = []
    index = 0
    while index < len(line):
        op = line[index]
        kind = op.kind
        size = 1
        if kind in _WHICH:
            receive = needed.get((kind, op.activation))
            if receive is not None and op.part in (None, parts - 1):
                out.append((MESSAGE, receive, (numbers.number(line[receive], stage),)))
            which = _WHICH[kind] + (0 if op.part is None else len(_WHICH))
            out.append((COMPUTE, index, which * chunks + op.chunk))
        elif kind in MESSAGES:
            if labelled and kind in _RECEIVES:
                out.append((NOTHING, index, None))
                index += 1
                continue
            size = 1 if labelled else batch_size(line, index)
            ends = tuple(numbers.number(line[index + k], stage) for k in range(size))
            out.append((MESSAGE, index, ends))
        elif kind is Kind.EVICT or kind is Kind.LOAD:
            started[kind, op.moved] = len(jobs)
            out.append((START, index, len(jobs)))
            jobs.append(Job(stage, op))
        elif kind is Kind.EVICT_WAIT:
            out.append((WAIT, index, started[Kind.EVICT, op.moved]))
        elif kind is Kind.LOAD_WAIT:
            out.append((WAIT, index, started[Kind.LOAD, op.moved]))
        else:
            out.append((NOTHING, index, None))
        index += size
    return out


_WHICH = {Kind.FORWARD: 0, Kind.BACKWARD: 1, Kind.WEIGHT: 2}
_RECEIVES = {Kind.RECV_FORWARD: Kind.FORWARD, Kind.RECV_BACKWARD: Kind.BACKWARD}


def _receives_of(line: Sequence[Op]) -> dict[tuple[Kind, Activation], int]:
    """For each computation that has a receive, where in the line that stands."""
    return {
        (_RECEIVES[op.kind], op.activation): index
        for index, op in enumerate(line)
        if op.kind in _RECEIVES
    }
