"""What transfers cost an iteration: it, against the same one without them.  Units: seconds."""

from __future__ import annotations

from dataclasses import replace

from megatron_bpipe.schedule.ops import Kind, Schedule
from megatron_bpipe.simulate.engine import simulate
from megatron_bpipe.simulate.result import Simulation


def exposed_seconds(simulation: Simulation) -> float:
    """How much longer the iteration is than with transfers that take no time and disturb nobody."""
    instant = simulate(
        _without_copies(simulation.schedule),
        simulation.costs,
        simulation.network,
    )
    return simulation.seconds - instant.seconds


_COPIES = (Kind.EVICT, Kind.LOAD, Kind.EVICT_WAIT, Kind.LOAD_WAIT, Kind.ACCEPT, Kind.RETURN)


def _without_copies(schedule: Schedule) -> Schedule:
    stages = tuple(tuple(op for op in line if op.kind not in _COPIES) for line in schedule.stages)
    return replace(schedule, stages=stages)
