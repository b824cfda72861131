"""ZB-H1: 1F1B whose weight gradients (W) wait until the stage would idle.

B computes the input's gradient only, so that the stage before can go on; W is put off as long as
1F1B's memory (p micro-batches on a stage) allows.  Bubble (p-1)(F + B - W) instead of 1F1B's
(p-1)(F + B + W).  Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism".

What waits for W is there as well, so all stages are about as full: the last ones, which hold few
micro-batches between F and B, hold the most between B and W.  For a pair to share its memory the
acceptor must not put its W off as far.  `zb_h1` with a budget gives it what the budget leaves
beside the slots it lends: from a bubble of 2(p-1) at the least budget (1F1B's without W) to ZB-H1's
p-1 at a budget of p.
"""

from __future__ import annotations

from collections import deque

from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.ops import Kind, Op, Schedule, is_evictor


def zb_h1(p: int, m: int, budget: float | None = None) -> Schedule:
    """ZB-H1 of ``m`` micro-batches on ``p`` stages, placed with F = B = W = 1.

    With ``budget`` (micro-batches) W comes early enough that `balance` can keep it.
    """
    base = one_f_one_b(p, m)
    most = [p if budget is None else _most(stage, p, min(p, int(budget))) for stage in range(p)]
    stages = [_Stage(list(line), most[stage]) for stage, line in enumerate(base.stages)]
    over: dict[tuple[int, Kind, int], int] = {}
    time = 0
    while any(stage.busy for stage in stages):
        ran = [(x, stage.step(x, p, time, over)) for x, stage in enumerate(stages)]
        time += 1
        for x, op in ran:
            if op is not None:
                over[x, op.kind, op.microbatch] = time
    return Schedule("zb-h1", m, tuple(tuple(stage.out) for stage in stages))


def _most(stage: int, p: int, budget: int) -> int:
    """Micro-batches between F and W that this stage may have, wherever they are."""
    ahead = p - stage  # what 1F1B needs
    if is_evictor(stage, p):
        return max(ahead, budget)
    away = max(0, stage + 1 - budget)  # of the partner, which is p - 1 - stage
    lent = away + 1 if away else 0  # one more while one comes and another goes
    return max(ahead, budget - lent)


class _Stage:
    """One stage while its line is being made."""

    def __init__(self, line: list[Op], most: int) -> None:
        self.todo, self.most = deque(line), most
        self.due: deque[Op] = deque()
        self.out: list[Op] = []
        self.held = 0

    @property
    def busy(self) -> bool:
        return bool(self.todo or self.due)

    def step(self, x: int, p: int, time: int, over: dict[tuple[int, Kind, int], int]) -> Op | None:
        """What runs in this unit of time: the next F or B if it can, else a W, else nothing."""
        if self.todo and self._ready(self.todo[0], x, p, time, over):
            op = self.todo.popleft()
            if op.kind is Kind.FORWARD:
                self.held += 1
            else:
                self.due.append(op._replace(kind=Kind.WEIGHT))
        elif self.due:
            op = self.due.popleft()
            self.held -= 1
        else:
            return None
        self.out.append(op)
        return op

    def _ready(
        self, op: Op, x: int, p: int, time: int, over: dict[tuple[int, Kind, int], int]
    ) -> bool:
        if op.kind is Kind.FORWARD:
            if self.held == self.most:
                return False
            return x == 0 or over.get((x - 1, Kind.FORWARD, op.microbatch), time + 1) <= time
        return x == p - 1 or over.get((x + 1, Kind.BACKWARD, op.microbatch), time + 1) <= time
