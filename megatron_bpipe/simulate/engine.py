"""The clock: runs every stage's ops in order and finds when each is over.

A message is a rendezvous: both ends wait until both have posted it and it has travelled.  With
time labels only the computation that needs it waits (sends are asynchronous, as with Megatron's
overlapped point-to-point communication).  Copies of one stage in one direction queue for its copy
engine.

Two ways lead to the same times.  While no speed depends on what else happens (``Network.shared`` is
off) each stage runs ahead until it must wait for another: when a message is over is the later of
its two posts plus its time, whatever the order in which they were found.  Otherwise all stages go
through one clock in order of time, and ``ContentionModel`` says how fast each activity is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.ops import Schedule
from megatron_bpipe.simulate.compile import (
    COMPUTE,
    MESSAGE,
    START,
    WAIT,
    Compiled,
    compile_steps,
    copy_of,
    seconds_of,
)
from megatron_bpipe.simulate.contention import ContentionModel
from megatron_bpipe.simulate.costs import Costs
from megatron_bpipe.simulate.network import FREE, Network
from megatron_bpipe.simulate.result import Simulation, Transfer


def simulate(schedule: Schedule, costs: Costs, network: Network = FREE) -> Simulation:
    """Run a lowered schedule.

    Raises ValueError for a schedule that is not lowered or costs of another number of stages, and
    ScheduleError if it deadlocks.
    """
    compiled = compile_steps(schedule)
    if len(costs.stages) != schedule.p:
        raise ValueError(
            f"costs for {len(costs.stages)} stages, the schedule has {schedule.p}: give one each"
        )
    run = (_SharedRun if network.shared else _Run)(schedule, compiled, costs, network)
    run.run()
    return Simulation(schedule, costs, network, run.starts, run.ends, run.transfers(compiled))


class _Run:
    """Each stage runs ahead until it must wait for another."""

    def __init__(
        self, schedule: Schedule, compiled: Compiled, costs: Costs, network: Network
    ) -> None:
        p = schedule.p
        self.schedule, self.compiled, self.costs = schedule, compiled, costs
        self.network, self.buffered = network, schedule.labelled
        self.starts = [[0.0] * len(line) for line in schedule.stages]
        self.ends = [[0.0] * len(line) for line in schedule.stages]
        self.next = [0] * p  # step each stage is at
        self.pending = [0] * p  # messages the stage's present step still waits for
        self.until = [0.0] * p  # when those that are known will be over
        self.posted = [-1.0] * len(compiled.receivers)
        self.seconds = [seconds_of(schedule, stage) for stage in costs.stages]
        ways = list(zip(compiled.senders, compiled.receivers, strict=True))
        paths = {way: network.path(*way) for way in set(ways)}
        self.paths = [paths[way] for way in ways]
        travel = {way: costs.send + path.seconds(costs.message) for way, path in paths.items()}
        self.travel = [travel[way] for way in ways]
        self.copies = [
            copy_of(job, schedule, costs.stages[job.stage], network) for job in compiled.jobs
        ]
        self.copied: list[tuple[float, float] | None] = [None] * len(compiled.jobs)
        self.engine_free: dict[tuple[int, object], float] = {}
        self.ready = [(0.0, stage) for stage in range(p)]

    def run(self) -> None:
        """Until no stage can move; raises ScheduleError if one is not at its end."""
        while self.ready:
            now, stage = heapq.heappop(self.ready)
            self.advance(stage, now)
        self.check_finished()

    def check_finished(self) -> None:
        """Raise ScheduleError, marking where each stuck stage stands, if any does."""
        steps = self.compiled.steps
        stuck = {x: steps[x][n][1] for x, n in enumerate(self.next) if n < len(steps[x])}
        if stuck:
            first = min(stuck)
            way = "buffered messages" if self.buffered else "messages that wait for both ends"
            raise ScheduleError(
                f"deadlock with {way}: none of the marked ops can proceed",
                self.schedule,
                first,
                stuck[first],
                stuck,
            )

    def transfers(self, compiled: Compiled) -> list[Transfer]:
        """All copies, as they ran."""
        return [
            Transfer(job.stage, job.op, *span)
            for job, span in zip(compiled.jobs, self.copied, strict=True)
            if span is not None
        ]

    def advance(self, stage: int, now: float) -> None:
        """Run this stage from its present step, which is not waiting any more."""
        steps, starts, ends = self.compiled.steps[stage], self.starts[stage], self.ends[stage]
        at, last, seconds = self.next[stage], len(steps), self.seconds[stage]
        while at < last:
            code, index, what = steps[at]
            if code == COMPUTE:
                starts[index] = now
                now += seconds[what]
                ends[index] = now
            elif code == MESSAGE:
                if self.until[stage] < 0:  # resumed: all its messages are over
                    self.until[stage] = 0.0
                else:
                    for k in range(len(what)):
                        starts[index + k] = now
                    missing, over = self.exchange(stage, now, what)
                    if missing:
                        self.pending[stage], self.until[stage] = missing, over
                        self.next[stage] = at
                        return
                    now = over
                for k in range(len(what)):
                    ends[index + k] = now
            elif code == START:
                starts[index] = ends[index] = now
                self.start_copy(what, now)
            elif code == WAIT:
                starts[index] = now
                span = self.copied[what]
                assert span is not None, "E and L come before EW and LW"
                now = max(now, span[1])
                ends[index] = now
            else:
                starts[index] = ends[index] = now
            at += 1
        self.next[stage] = at

    def exchange(self, stage: int, now: float, numbers: tuple[int, ...]) -> tuple[int, float]:
        """Post these messages; how many are not known to be over yet, and when the others are."""
        missing, over = 0, now
        posted, senders = self.posted, self.compiled.senders
        for number in numbers:
            earlier = posted[number]
            sends = senders[number] == stage
            other = self.compiled.receivers[number] if sends else senders[number]
            if earlier < 0:
                posted[number] = now
                missing += not (sends and self.buffered)
                continue
            if self.buffered:
                end = (now if sends else earlier) + self.travel[number]
                if sends:
                    self.arrived(other, end)
                elif end > over:
                    over = end
                continue
            end = max(now, earlier) + self.travel[number]
            if end > over:
                over = end
            self.arrived(other, end)
        return missing, over

    def arrived(self, stage: int, end: float) -> None:
        """One message that this stage waits for is over at ``end``."""
        if end > self.until[stage]:
            self.until[stage] = end
        self.pending[stage] -= 1
        if self.pending[stage] == 0:
            heapq.heappush(self.ready, (self.until[stage], stage))
            self.until[stage] = -1.0

    def start_copy(self, number: int, now: float) -> None:
        """An E or L: the copy runs when its engine is free."""
        copy, engine = self.copies[number], self.engine(number)
        start = max(now, self.engine_free.get(engine, 0.0))
        end = start + copy.fixed + copy.path.seconds(copy.size)
        self.engine_free[engine] = end
        self.copied[number] = start, end

    def engine(self, number: int) -> tuple[int, object]:
        """Which copy engine runs this transfer."""
        job = self.compiled.jobs[number]
        return job.stage, job.op.kind if self.network.full_duplex else None


class _SharedRun(_Run):
    """All stages through one clock; activities share links."""

    def __init__(
        self, schedule: Schedule, compiled: Compiled, costs: Costs, network: Network
    ) -> None:
        super().__init__(schedule, compiled, costs, network)
        self.now = 0.0
        self.contention = ContentionModel(network)
        self.begun: dict[int, float] = {}  # copies under way
        self.queued: dict[tuple[int, object], list[int]] = {}  # copies waiting for their engine
        self.waiting: dict[int, int] = {}  # transfer -> stage that waits for it
        self.later: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0

    def run(self) -> None:
        """In order of time."""
        for stage in range(self.schedule.p):
            self.advance(stage, 0.0)
        while self.later or self.contention.busy:
            at = self.later[0][0] if self.later else None
            finished = self.contention.next_over(at)
            if finished is not None:
                self.now, done = finished
                done()
            else:
                self.now, _, action = heapq.heappop(self.later)
                action()
        self.check_finished()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do ``action`` so much later."""
        self.count += 1
        heapq.heappush(self.later, (self.now + seconds, self.count, action))

    def advance(self, stage: int, now: float) -> None:
        """One step after the other until one takes time."""
        steps, starts, ends = self.compiled.steps[stage], self.starts[stage], self.ends[stage]
        while self.next[stage] < len(steps):
            code, index, what = steps[self.next[stage]]
            starts[index] = ends[index] = now
            if code == COMPUTE:
                seconds = self.seconds[stage][what]
                self.contention.compute(now, stage, seconds, lambda: self.step_over(stage))
                return
            if code == MESSAGE:
                for k in range(len(what)):
                    starts[index + k] = ends[index + k] = now
                self.pending[stage] = len(what)
                for number in what:
                    self.post(number, stage)
                if self.pending[stage]:
                    return
            elif code == START:
                self.start_copy(what, now)
            elif code == WAIT and self.copied[what] is None:
                self.waiting[what] = stage
                return
            self.next[stage] += 1

    def step_over(self, stage: int) -> None:
        """The present step of this stage is over now."""
        _, index, what = self.compiled.steps[stage][self.next[stage]]
        size = len(what) if isinstance(what, tuple) else 1
        for k in range(size):
            self.ends[stage][index + k] = self.now
        self.next[stage] += 1
        self.advance(stage, self.now)

    def post(self, number: int, stage: int) -> None:
        """One end of a message: it travels once both (buffered: once the sender) have posted."""
        sends = self.compiled.senders[number] == stage
        earlier, self.posted[number] = self.posted[number], self.now
        if self.buffered and sends:
            self.pending[stage] -= 1
            self.travel_now(number)
        elif self.buffered and earlier == _ARRIVED:
            self.pending[stage] -= 1
        elif not self.buffered and earlier >= 0:
            self.travel_now(number)

    def travel_now(self, number: int) -> None:
        path = self.paths[number]
        fixed, size = self.costs.send + path.link.latency, float(self.costs.message)
        self.after(
            fixed, lambda: self.contention.flow(self.now, path, size, lambda: self.over(number))
        )

    def over(self, number: int) -> None:
        """A message has arrived."""
        receiver, sender = self.compiled.receivers[number], self.compiled.senders[number]
        for end in (receiver,) if self.buffered else (receiver, sender):
            if self.buffered and not self.awaits(end, number):
                self.posted[number] = _ARRIVED
                continue
            self.pending[end] -= 1
            if self.pending[end] == 0:
                self.step_over(end)

    def awaits(self, stage: int, number: int) -> bool:
        """Whether the stage's present step is this message."""
        steps, at = self.compiled.steps[stage], self.next[stage]
        return at < len(steps) and steps[at][0] == MESSAGE and number in steps[at][2]

    def start_copy(self, number: int, now: float) -> None:
        """An E or L: joins its engine's queue."""
        queue = self.queued.setdefault(self.engine(number), [])
        queue.append(number)
        if len(queue) == 1:
            self.copy(number)

    def copy(self, number: int) -> None:
        copy = self.copies[number]
        self.begun[number] = self.now
        self.after(
            copy.fixed + copy.path.link.latency,
            lambda: self.contention.flow(
                self.now, copy.path, float(copy.size), lambda: self.copy_over(number)
            ),
        )

    def copy_over(self, number: int) -> None:
        self.copied[number] = self.begun.pop(number), self.now
        queue = self.queued[self.engine(number)]
        queue.pop(0)
        if queue:
            self.copy(queue[0])
        if number in self.waiting:
            self.step_over(self.waiting.pop(number))


_ARRIVED = -2.0
