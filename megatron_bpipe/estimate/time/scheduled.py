"""The schedule that a run executes, made once: as it is, lowered, and what it holds.

Units: micro-batches (activations of one chunk where a schedule has chunks).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.schedule.balancing.balance import least_budget
from megatron_bpipe.schedule.balancing.offload import offload
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Schedule, default_budget, microbatches, units
from megatron_bpipe.schedule.validation.occupancy import occupancy


def schedule_of(run: Run) -> Schedule:
    """The schedule this run executes: 1F1B or interleaved, balanced or offloaded if it says so.

    Raises EstimateError where it cannot: a budget that is too small, or interleaving with a number
    of micro-batches that is no multiple of p.
    """
    return _schedule(*_shape(run))


def lowered_of(run: Run) -> Schedule:
    """The same lowered; raises EstimateError."""
    return _lowered(*_shape(run))


def held_by_stage(run: Run) -> tuple[tuple[int, int], ...]:
    """For each stage: most activations of its own there, and most that it has on its partner.

    Raises EstimateError.
    """
    p, m, *rest = _shape(run)
    return _held(p, _enough(p, m), *rest)


def budgets_of(run: Run) -> tuple[float, ...]:
    """All budgets of BPipe on this run, largest first: from what evicts nothing to the least.

    Raises EstimateError where its schedule does not exist.
    """
    held = held_by_stage(replace(run, bpipe=False, budget=None))[0][0]
    p, m, chunks = run.layout.pp, run.micro_batches, run.chunks
    least = units(_least_budget(p, _enough(p, m), chunks), chunks)
    return tuple(microbatches(n, chunks) for n in range(held, least - 1, -1))


def _enough(p: int, m: int) -> int:
    """As few micro-batches as show all that a stage ever holds: from 4 p on it repeats (tested)."""
    return m if m <= 5 * p else 4 * p + m % p


def _shape(run: Run) -> tuple[int, int, bool, bool, int, float | None]:
    """All that the schedule depends on."""
    return run.layout.pp, run.micro_batches, run.bpipe, run.host, run.chunks, run.budget


@lru_cache(maxsize=64)
def _schedule(
    p: int, m: int, bpipe: bool, host: bool, chunks: int, budget: float | None
) -> Schedule:
    try:
        if host:
            return offload(one_f_one_b(p, m), int(budget or default_budget(p)))
        name = "interleaved" if chunks > 1 else "1f1b"
        return make(ScheduleSpec(name, p, m, chunks, balanced=bpipe, budget=budget))
    except ValueError as error:
        raise EstimateError(str(error)) from error


@lru_cache(maxsize=4096)
def _least_budget(p: int, m: int, chunks: int) -> float:
    return least_budget(_schedule(p, m, False, False, chunks, None))


@lru_cache(maxsize=64)
def _lowered(
    p: int, m: int, bpipe: bool, host: bool, chunks: int, budget: float | None
) -> Schedule:
    return lower(_schedule(p, m, bpipe, host, chunks, budget))


@lru_cache(maxsize=4096)
def _held(
    p: int, m: int, bpipe: bool, host: bool, chunks: int, budget: float | None
) -> tuple[tuple[int, int], ...]:
    return held_in(_schedule(p, m, bpipe, host, chunks, budget))


def held_in(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """For each stage: most activations of its own there, and most that it has on its partner."""
    counts = [occupancy(line) for line in schedule.stages]
    remote = [0 if schedule.to_host else max(lent, default=0) for _, lent in counts]
    return tuple((max(own, default=0), r) for (own, _), r in zip(counts, remote, strict=True))
