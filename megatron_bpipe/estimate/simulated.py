"""The time of one iteration from a simulation of its schedule.

Backwards take twice a forward.  Without BPipe a few more micro-batches than stages are simulated:
from then on 1F1B repeats itself, each further micro-batch taking as long as the last one (tested
against simulations of all).

Units: seconds.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_bpipe.estimate.iteration_time import Costs
from megatron_bpipe.schedule.balance import balance
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.lower import lower
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
    enough = 2 * p
    if bpipe or m <= enough:
        return simulate(_lowered(p, m, bpipe), costs).seconds
    first = simulate(_lowered(p, enough, bpipe), costs).seconds
    more = simulate(_lowered(p, enough + 1, bpipe), costs).seconds
    return first + (m - enough) * (more - first)


@lru_cache(maxsize=64)
def _lowered(p: int, m: int, bpipe: bool) -> Schedule:
    schedule = one_f_one_b(p, m)
    return lower(balance(schedule) if bpipe else schedule)
