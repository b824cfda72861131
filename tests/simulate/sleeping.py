"""Runs schedules on the real executor with stages that pass time instead of computing.

``python -m tests.simulate.sleeping P OUT``: P processes over gloo, activations over the real
shared-memory transport.  First every op is measured alone (a message by round trips, the others by
lines without messages), then each schedule runs once.  Writes ``OUT/rankN.json``.

``python -m tests.simulate.sleeping P OUT clock``: the same processes, messages and copies, but time
is a logical clock of each rank that its messages carry, as Lamport's: a computation adds what it
costs, whoever waits for a message goes on when that is there.  What a copy takes is not in it.
Nothing depends on the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.runtime.executor import ScheduleExecutor
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport.pair.handshake import BorrowedPool, LentPool, PairEnd
from megatron_bpipe.schedule import (
    Kind,
    Op,
    Schedule,
    balance,
    is_evictor,
    lower,
    one_f_one_b,
    slots,
)
from megatron_bpipe.schedule.bases.gpipe import gpipe

DEADLINE = 60
MESSAGE = 64 * 1024  # elements
ACTIVATION = 512 * 1024  # elements that a forward saves beside its input
ALONE = (Op.parse("F0"), Op.parse("B0"))
MOVED = "F0 F1 E0 B1 EW0 L0 F2 LW0 E2 B0 EW2 L2 F3 LW2 B2 B3"


def schedules(p: int) -> dict[str, Schedule]:
    """What is run; short, so that a run takes seconds."""
    m = p + 4
    bases = {
        "1f1b": one_f_one_b(p, m),
        "bpipe": balance(one_f_one_b(p, m)),
        "gpipe": gpipe(p, m),
    }
    return {name: lower(schedule) for name, schedule in bases.items()}


def seconds(stage: int) -> tuple[float, float]:
    """How long a forward and a backward of this stage sleep: no two stages alike."""
    return 0.100 + 0.004 * (stage % 3), 0.140 + 0.006 * (stage % 2)


class Layer(torch.autograd.Function):
    """Saves what a layer would; its computation is time that the stage spends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stage: SleepingStage) -> torch.Tensor:
        stage.spend(seconds(stage.stage)[0])
        ctx.stage = stage
        ctx.save_for_backward(x.new_full((ACTIVATION,), 1.0))
        return x + 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.stage.spend(seconds(ctx.stage.stage)[1])
        (kept,) = ctx.saved_tensors
        return gradients[0] * kept[0], None


class SleepingStage:
    """A stage of the executor over gloo."""

    def __init__(self, stage: int, p: int) -> None:
        self.stage, self.p = stage, p
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.gradients: dict[int, torch.Tensor] = {}
        self.arriving: dict[tuple[Kind, int], Any] = {}
        self.sending: list[Any] = []

    def neighbour(self, op: Op) -> int:
        """The stage that a message goes to or comes from."""
        ahead = op.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
        return self.stage + 1 if ahead else self.stage - 1

    def spend(self, seconds: float) -> None:
        """A computation of so many seconds."""
        time.sleep(seconds)

    def exchange(self, ops: Sequence[Op]) -> None:
        """Labelled messages are waited for when they are needed, others at once."""
        works = []
        for op in ops:
            i, other = op.microbatch, self.neighbour(op)
            if op.kind is Kind.SEND_FORWARD:
                works.append(dist.isend(self.sent(self.outputs[i].detach()), other))
            elif op.kind is Kind.SEND_BACKWARD:
                gradient = self.inputs.pop(i).grad
                assert gradient is not None
                works.append(dist.isend(self.sent(gradient), other))
            else:
                into = self.inputs if op.kind is Kind.RECV_FORWARD else self.gradients
                into[i] = torch.empty(MESSAGE)
                work = dist.irecv(into[i], other)
                if op.label is not None:
                    self.arriving[op.kind, i] = work
                    continue
                works.append(work)
        if ops[0].label is not None:
            self.sending += works
            return
        for work in works:
            work.wait()

    def sent(self, message: torch.Tensor) -> torch.Tensor:
        """What is sent for it."""
        return message

    def arrived(self, kind: Kind, microbatch: int) -> None:
        """Wait for a labelled message that this computation needs, if there is one."""
        work = self.arriving.pop((kind, microbatch), None)
        if work is not None:
            work.wait()

    def forward(self, op: Op) -> torch.Tensor:
        self.arrived(Kind.RECV_FORWARD, op.microbatch)
        x = self.inputs.get(op.microbatch, torch.zeros(MESSAGE)).requires_grad_()
        self.inputs[op.microbatch] = x
        self.outputs[op.microbatch] = Layer.apply(x, self)
        return self.outputs[op.microbatch]

    def backward(self, op: Op) -> None:
        self.arrived(Kind.RECV_BACKWARD, op.microbatch)
        gradient = self.gradients.pop(op.microbatch, torch.ones(MESSAGE))
        torch.autograd.backward([self.outputs.pop(op.microbatch)], [gradient])


HOP = 0.003
"""Seconds of a message on the logical clock."""


class ClockedStage(SleepingStage):
    """The same on a logical clock; a message's last element is when it was posted."""

    def __init__(self, stage: int, p: int) -> None:
        super().__init__(stage, p)
        self.now = 0.0
        self.computed: list[list[Any]] = []  # op, when it began, when it ended
        self.op: Op | None = None

    def spend(self, seconds: float) -> None:
        self.computed.append([str(self.op), self.now, self.now + seconds])
        self.now += seconds

    def forward(self, op: Op) -> torch.Tensor:
        self.op = op
        return super().forward(op)

    def backward(self, op: Op) -> None:
        self.op = op
        super().backward(op)

    def sent(self, message: torch.Tensor) -> torch.Tensor:
        message = message.clone()
        message[-1] = self.now
        return message

    def exchange(self, ops: Sequence[Op]) -> None:
        """Unlabelled messages begin when both ends have posted them, so both must know when."""
        if ops[0].label is not None:
            super().exchange(ops)
            return
        others = [self.neighbour(op) for op in ops]
        mine = torch.tensor([self.now], dtype=torch.float64)
        theirs = [torch.empty(1, dtype=torch.float64) for _ in ops]
        works = [dist.isend(mine, other, tag=1) for other in others]
        works += [
            dist.irecv(clock, other, tag=1) for clock, other in zip(theirs, others, strict=True)
        ]
        super().exchange(ops)
        for work in works:
            work.wait()
        self.now = max([self.now, *map(float, theirs)]) + HOP

    def arrived(self, kind: Kind, microbatch: int) -> None:
        expected = (kind, microbatch) in self.arriving
        super().arrived(kind, microbatch)
        if expected:
            into = self.inputs if kind is Kind.RECV_FORWARD else self.gradients
            self.now = max(self.now, float(into[microbatch][-1]) + HOP)


class Rank:
    """One process."""

    def __init__(self, stage: int, p: int, out: Path) -> None:
        self.stage, self.p, self.out = stage, p, out
        store = dist.FileStore(str(out / "store"), p)
        dist.init_process_group(
            "gloo", store=store, rank=stage, world_size=p, timeout=timedelta(seconds=DEADLINE)
        )
        self.rendezvous_store = dist.FileStore(str(out / "rendezvous_store"), p)
        bpipe = schedules(p)["bpipe"]
        self.borrowed = slots(bpipe, stage) if is_evictor(stage, p) else 0
        lent = slots(bpipe, p - 1 - stage) if stage >= p - p // 2 else 0
        self.acceptor_end = None
        self.activations = None
        self.recorder = Recorder(stage, stage, lambda: None)
        if self.borrowed:
            pool = BorrowedPool(self._end(stage, "evictor"), self.borrowed)
            self.activations = ActivationStore(
                lambda _: pool.open()[1], request=pool.request, on_load=self.recorder.loaded
            )
        if lent:
            self.acceptor_end = LentPool(self._end(p - 1 - stage, "acceptor"))

    def _end(self, evictor: int, which: str) -> PairEnd:
        pair, cpu = f"{evictor}-{self.p - 1 - evictor}", torch.device("cpu")
        return PairEnd(pair, which, "shm", cpu, DEADLINE, self.rendezvous_store)

    def run(self, ops: tuple[Op, ...], stage: SleepingStage | None = None) -> list[Any]:
        """One run; its events."""
        stage = stage or SleepingStage(self.stage, self.p)
        self.recorder.begin(())
        ScheduleExecutor(ops, stage, self.activations, self.acceptor_end, [self.recorder]).run()
        for work in stage.sending:
            work.wait()
        self.recorder.end([])
        return list(self.recorder.timeline[-1])

    def measure(self) -> dict[str, float]:
        """What each op takes alone."""
        for _ in range(2):  # the first time of everything is slower
            self.run(ALONE)
        moves = self.run(tuple(map(Op.parse, MOVED.split()))) if self.borrowed else []
        alone = [event for _ in range(6) for event in self.run(ALONE)]

        def middle(events: list[Any], kind: str) -> float:
            return statistics.median([e.end - e.start for e in events if e.op.startswith(kind)])

        copies = {
            kind: [e.copy_end - e.copy_start for e in moves if e.op.startswith(kind)]
            for kind in ("EW", "LW")
        }
        return {
            "forward": middle(alone, "F"),
            "backward": middle(alone, "B"),
            "evict": statistics.fmean(copies["EW"] or [0.0]),
            "load": statistics.fmean(copies["LW"] or [0.0]),
            "hop": self._hop(),
        }

    def _hop(self) -> float:
        """Half a round trip to the next stage; 0 on the last."""
        tensor, took = torch.zeros(MESSAGE), 0.0
        for edge in range(self.p - 1):
            dist.barrier()
            for number in range(22):
                if number == 2:
                    begin = time.perf_counter()
                if self.stage == edge:
                    dist.send(tensor, edge + 1)
                    dist.recv(tensor, edge + 1)
                elif self.stage == edge + 1:
                    dist.recv(tensor, edge)
                    dist.send(tensor, edge)
            if self.stage == edge:
                took = (time.perf_counter() - begin) / 40
        dist.barrier()
        return took

    def main(self, clocked: bool) -> None:
        result: dict[str, Any] = {"runs": {}}
        if not clocked:
            result["costs"] = self.measure()
        for name, schedule in schedules(self.p).items():
            dist.barrier()
            stage = (ClockedStage if clocked else SleepingStage)(self.stage, self.p)
            events = self.run(schedule.stages[self.stage], stage)
            result["runs"][name] = {
                "start": events[0].start,
                "end": events[-1].end,
                "live": [[e.op, e.live_microbatches] for e in events],
                "computed": stage.computed if isinstance(stage, ClockedStage) else [],
            }
        dist.barrier()
        (self.out / f"rank{self.stage}.json").write_text(json.dumps(result))
        for end in (self.activations, self.acceptor_end):
            if end is not None:
                end.close()


def main() -> int:
    """Fork the ranks, wait, end those that are left when one fails."""
    p, out = int(sys.argv[1]), Path(sys.argv[2])
    pids = {}
    for stage in range(p):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                Rank(stage, p, out).main(clocked="clock" in sys.argv[3:])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids[pid] = stage
    failed = 0
    while pids:
        pid, status = os.wait()
        stage = pids.pop(pid)
        if status and not failed:
            failed = 1
            sys.stderr.write(f"stage {stage} ended with status {status}\n")
            for other in pids:
                os.kill(other, 15)
    return failed


if __name__ == "__main__":
    sys.exit(main())
