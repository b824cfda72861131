"""What an iteration's time is made of, and a closed form of it for 1F1B.

The estimator simulates the schedule (``simulated``); ``iteration_seconds`` is what comes out of
that for equal stages, in one line of arithmetic.  ``IterationTime`` is the type of both.

Units: seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What one micro-batch, and one iteration, cost.

    ``stage`` forward and backward of one micro-batch in one stage, without the output layer;
    ``head`` the same for the output layer and loss of the last stage; ``exchange`` one send with
    one neighbour, synchronisation included; ``once`` what happens once per iteration after the
    pipeline has drained (optimizer, data-parallel reduce); ``exposed`` transfers of BPipe that
    nothing hides, per iteration; ``transfer`` one eviction or load alone on its link, None for a
    run without BPipe.
    """

    stage: float
    head: float
    exchange: float
    once: float
    exposed: float
    transfer: float | None = None


IterationTime = Callable[[Costs, int, int], float]
"""Costs, number of stages p, micro-batches m, to seconds per iteration."""


def iteration_seconds(costs: Costs, p: int, m: int) -> float:
    """Fill and drain, then m micro-batches at the pace of the slowest stage.

    In the steady state a middle stage exchanges with both neighbours for each micro-batch, the
    last one with one only but has the head.  So head and sends do not add up: the pace is
    stage + max(2 exchange, exchange + head).  Filling and draining cross every link once each way.
    """
    exchanges = min(2, p - 1)  # of the busiest stage, per micro-batch
    on_the_last = min(1, p - 1)
    pace = costs.stage + max(exchanges * costs.exchange, on_the_last * costs.exchange + costs.head)
    fill_and_drain = (p - 1) * (costs.stage + 2 * costs.exchange)
    return fill_and_drain + m * pace + costs.once + costs.exposed
