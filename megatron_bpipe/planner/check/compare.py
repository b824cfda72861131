"""Predictions of the published runs, run by run, and how far off they are.

Units: seconds, GiB, shares of what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_bpipe.planner.check.runs import PublishedRun, published_runs
from megatron_bpipe.planner.evaluate import memory_of, place, seconds_of
from megatron_bpipe.planner.inputs.cluster import preset
from megatron_bpipe.planner.inputs.sources import from_layer_model


@dataclass(frozen=True)
class Compared:
    """One run measured and predicted; ``gib`` is what the allocator sees."""

    published: PublishedRun
    seconds: float
    gib: float

    @property
    def seconds_off(self) -> float | None:
        """Predicted over measured, less 1."""
        measured = self.published.seconds
        return None if measured is None else self.seconds / measured - 1

    @property
    def gib_off(self) -> float | None:
        """Predicted over measured, less 1."""
        measured = self.published.gib
        return None if measured is None else self.gib / measured - 1


@dataclass(frozen=True)
class Error:
    """Mean and worst distance, and of how many runs."""

    mean: float
    worst: float
    runs: int


def compare(runs: Sequence[PublishedRun] | None = None) -> tuple[Compared, ...]:
    """All of them predicted."""
    return tuple(compare_one(run) for run in (published_runs() if runs is None else runs))


def compare_one(published: PublishedRun) -> Compared:
    """One of them: the layer model, the links, the executed schedule, the memory model."""
    run = published.run
    predictor = from_layer_model(published.kernels.element, 0, published.kernels, published.state)
    cluster = preset(published.gpu, run.layout.gpus, published.node)
    candidate = place(run, cluster, predictor)
    allocated = memory_of(candidate, predictor).allocated
    stage = allocated.index(max(allocated)) if published.stage is None else published.stage
    return Compared(published, seconds_of(candidate, predictor), allocated[stage])


def error(distances: Iterable[float | None]) -> Error:
    """Of those that are known."""
    found = [abs(distance) for distance in distances if distance is not None]
    return Error(statistics.mean(found), max(found), len(found)) if found else Error(0.0, 0.0, 0)
