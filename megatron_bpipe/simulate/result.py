"""What a simulation found, and the figures drawn from it.  Units: seconds from the start."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.schedule.ops import Kind, Op, Schedule
from megatron_bpipe.schedule.validation.occupancy import occupancy
from megatron_bpipe.simulate.costs import Costs
from megatron_bpipe.simulate.network import Network


@dataclass(frozen=True, slots=True)
class Transfer:
    """One eviction or load: the copy itself ran from ``start`` to ``end``."""

    stage: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """When each op of each stage began and was over.

    ``starts[x][n]`` and ``ends[x][n]`` belong to op n of stage x's line.  A message begins when it
    is posted and is over when the stage may go on; E and L take no time of the stage, EW and LW
    last as long as the stage has to wait.
    """

    schedule: Schedule
    costs: Costs
    network: Network
    starts: list[list[float]]
    ends: list[list[float]]
    transfers: list[Transfer]

    @property
    def pipeline_seconds(self) -> float:
        """Until the last op of the last stage is over."""
        return max((line[-1] for line in self.ends if line), default=0.0)

    @property
    def seconds(self) -> float:
        """One iteration, with what happens once after the pipeline has drained."""
        return self.pipeline_seconds + self.costs.once

    def _repr_html_(self) -> str:
        """What a notebook shows: the drawing of this schedule, in units of its costs."""
        from megatron_bpipe.simulate.draw.html import notebook_page  # draws what this is

        return notebook_page(self)


def computing_seconds(simulation: Simulation, stage: int) -> float:
    """Time this stage computes."""
    line = simulation.schedule.stages[stage]
    starts, ends = simulation.starts[stage], simulation.ends[stage]
    return sum(ends[n] - starts[n] for n, op in enumerate(line) if op.kind.computation)


def bubble_ratio(simulation: Simulation) -> float:
    """Share of all stages' time, until the pipeline has drained, in which they do not compute."""
    p, end = simulation.schedule.p, simulation.pipeline_seconds
    if end == 0:
        return 0.0
    return 1 - sum(computing_seconds(simulation, stage) for stage in range(p)) / (p * end)


def waiting_seconds(simulation: Simulation, stage: int) -> float:
    """Time this stage stands still because an eviction or a load is not over (EW, LW)."""
    line = simulation.schedule.stages[stage]
    starts, ends = simulation.starts[stage], simulation.ends[stage]
    waits = (Kind.EVICT_WAIT, Kind.LOAD_WAIT)
    return sum(ends[n] - starts[n] for n, op in enumerate(line) if op.kind in waits)


def live_microbatches(schedule: Schedule) -> list[int]:
    """Most units on each stage: micro-batches, activations of a chunk, or parts of them."""
    return [max(occupancy(line, schedule.parts)[0], default=0) for line in schedule.stages]
