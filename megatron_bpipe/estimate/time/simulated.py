"""The time of one iteration from a simulation of its schedule.

Backwards take twice a forward.  Without BPipe a few more micro-batches than stages are simulated:
from then on 1F1B repeats itself, each further micro-batch taking as long as the last one (tested
against simulations of all).

Units: seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from megatron_bpipe.estimate.time.iteration_time import Costs
from megatron_bpipe.schedule.balancing.balance import balance
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Schedule
from megatron_bpipe.simulate.costs import Costs as OpCosts
from megatron_bpipe.simulate.costs import StageCosts
from megatron_bpipe.simulate.engine import simulate

_FORWARD = 1 / 3  # of a stage's forward and backward


def simulated_seconds(costs: Costs, p: int, m: int) -> float:
    """Seconds of an iteration of 1F1B, with BPipe where ``costs`` has transfers."""
    pipeline = _pipeline_seconds(costs.stage, costs.head, costs.exchange, costs.transfer, p, m)
    return pipeline + costs.once + costs.exposed


@lru_cache(maxsize=4096)
def _pipeline_seconds(
    stage: float, head: float, exchange: float, transfer: float | None, p: int, m: int
) -> float:
    bpipe = transfer is not None
    parts = [
        StageCosts(
            forward=(_FORWARD * (stage + (head if x == p - 1 else 0.0)),),
            backward=((1 - _FORWARD) * (stage + (head if x == p - 1 else 0.0)),),
            evict=transfer or 0.0,
            load=transfer or 0.0,
        )
        for x in range(p)
    ]
    costs = OpCosts(tuple(parts), send=exchange)

    def seconds(n: int) -> float:
        return simulate(_lowered(p, n, bpipe), costs).seconds

    return seconds(m) if bpipe else at_steady_pace(seconds, m, 2 * p, 1)


def at_steady_pace(seconds: Callable[[int], float], m: int, first: int, step: int) -> float:
    """``seconds`` of ``m`` micro-batches, long iterations from a shorter one and its steady pace.

    From ``first`` micro-batches on every further ``step`` must take as long as the last ones did;
    tested for the schedules that this is used for.
    """
    if m <= first + step:
        return seconds(m)
    short = seconds(first)
    return short + (m - first) / step * (seconds(first + step) - short)


@lru_cache(maxsize=64)
def _lowered(p: int, m: int, bpipe: bool) -> Schedule:
    schedule = one_f_one_b(p, m)
    return lower(balance(schedule) if bpipe else schedule)
