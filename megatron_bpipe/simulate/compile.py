"""From lines of lowered ops to the steps that the engine runs.

A step is a tuple (code, index of its op, what the code needs):

=========  ==================================================================
COMPUTE    seconds
MESSAGE    ends of messages: one, or all of a batched call
START      number of the transfer that E or L starts
WAIT       number of the transfer that EW or LW waits for
NOTHING    AC and RT: the transports are one-sided; posting a labelled receive
=========  ==================================================================

Messages with time labels are posted and not waited for (``Schedule.labelled``): the step that waits
for a receive stands directly before the computation that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_bpipe.schedule.lowering.batches import batch_size
from megatron_bpipe.schedule.lowering.routes import (
    Activation,
    downstream,
    known_activations,
    upstream,
)
from megatron_bpipe.schedule.ops import HOST, MESSAGES, UP, Kind, Op, Schedule, other_end
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.network import Network, Path

COMPUTE, MESSAGE, START, WAIT, NOTHING = range(5)
Step = tuple[int, int, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """A transfer: which op of which stage, how its bytes go, fixed seconds, bytes."""

    stage: int
    index: int
    op: Op
    path: Path
    fixed: float
    size: int


@dataclass
class Compiled:
    """Steps of every stage, all transfers, and per message its path and the stage it goes to."""

    steps: list[list[Step]]
    jobs: list[Job]
    paths: list[Path]
    senders: list[int]
    receivers: list[int]


def compile_steps(schedule: Schedule, costs: Costs, network: Network) -> Compiled:
    """Raises ValueError unless the schedule is lowered and there are costs for every stage."""
    if not schedule.lowered:
        raise ValueError(f"{schedule.name} is not lowered: simulate what lower() returns")
    if len(costs.stages) != schedule.p:
        raise ValueError(
            f"costs for {len(costs.stages)} stages, the schedule has {schedule.p}: give one each"
        )
    numbers = _Numbers(schedule, network)
    jobs: list[Job] = []
    steps = [
        _line_steps(schedule, stage, costs.stages[stage], network, numbers, jobs)
        for stage in range(schedule.p)
    ]
    return Compiled(steps, jobs, numbers.paths, numbers.senders, numbers.receivers)


class _Numbers:
    """Numbers the messages: (receiver, forward, activation as the receiver calls it)."""

    def __init__(self, schedule: Schedule, network: Network) -> None:
        self.p = schedule.p
        self.known = known_activations(schedule)
        self.network = network
        self.forward: list[dict[Activation, int]] = [{} for _ in range(self.p)]
        self.backward: list[dict[Activation, int]] = [{} for _ in range(self.p)]
        self.paths: list[Path] = []
        self.senders: list[int] = []
        self.receivers: list[int] = []
        self._cache: dict[tuple[int, int], Path] = {}

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
            self.paths.append(_NO_PATH)
        if sender >= 0:
            self.senders[number] = sender
            path = self._cache.get((sender, receiver))
            if path is None:
                path = self._cache[sender, receiver] = self.network.path(sender, receiver)
            self.paths[number] = path
        return number


_NO_PATH = Network().path(0, 0)


def _line_steps(
    schedule: Schedule,
    stage: int,
    costs: StageCosts,
    network: Network,
    numbers: _Numbers,
    jobs: list[Job],
) -> list[Step]:
    line = schedule.stages[stage]
    seconds = _compute_seconds(line, costs)
    started: dict[tuple[Kind, tuple[Activation, int]], int] = {}
    labelled = schedule.labelled
    needed = _receives_of(line) if labelled else {}
    out: list[Step] = []
    index = 0
    while index < len(line):
        op = line[index]
        kind = op.kind
        size = 1
        if kind in seconds:
            receive = needed.get((kind, op.activation))
            if receive is not None and op.part in (None, schedule.parts - 1):
                out.append((MESSAGE, receive, (numbers.number(line[receive], stage),)))
            table = seconds[kind]
            whole = table[op.chunk if op.chunk < len(table) else -1]
            out.append((COMPUTE, index, whole if op.part is None else whole / schedule.parts))
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
            jobs.append(_job(schedule, stage, index, op, costs, network))
        elif kind is Kind.EVICT_WAIT:
            out.append((WAIT, index, started[Kind.EVICT, op.moved]))
        elif kind is Kind.LOAD_WAIT:
            out.append((WAIT, index, started[Kind.LOAD, op.moved]))
        else:
            out.append((NOTHING, index, None))
        index += size
    return out


_RECEIVES = {Kind.RECV_FORWARD: Kind.FORWARD, Kind.RECV_BACKWARD: Kind.BACKWARD}


def _receives_of(line: Sequence[Op]) -> dict[tuple[Kind, Activation], int]:
    """For each computation that has a receive, where in the line that stands."""
    return {
        (_RECEIVES[op.kind], op.activation): index
        for index, op in enumerate(line)
        if op.kind in _RECEIVES
    }


def _compute_seconds(line: Sequence[Op], costs: StageCosts) -> dict[Kind, tuple[float, ...]]:
    return {
        Kind.FORWARD: costs.forward,
        Kind.BACKWARD: tuple(s + costs.recompute for s in costs.backward),
        Kind.WEIGHT: costs.weight,
    }


def _job(
    schedule: Schedule, stage: int, index: int, op: Op, costs: StageCosts, network: Network
) -> Job:
    out = op.kind is Kind.EVICT
    other = other_end(schedule, stage, op)
    if other == HOST:
        path = network.host_path(stage, out=out)
    else:
        path = network.path(stage, other) if out else network.path(other, stage)
    fixed = costs.evict if out else costs.load
    return Job(stage, index, op, path, fixed / schedule.parts, costs.moved // schedule.parts)
