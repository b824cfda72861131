"""The schedule that a run executes, made once: as it is, lowered, and what it holds.

Units: micro-batches (activations of one chunk where a schedule has chunks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.schedule.balancing.balance import least_budget
from megatron_bpipe.schedule.balancing.offload import offload
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec, make
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import (
    Kind,
    Op,
    Schedule,
    default_budget,
    microbatches,
    units,
)
from megatron_bpipe.schedule.validation.occupancy import occupancy


class _Shape(NamedTuple):
    """All that a schedule depends on; ``iterations`` between two flushes, where there is none."""

    p: int
    m: int
    name: str
    chunks: int
    bpipe: bool
    host: bool
    budget: float | None
    iterations: int = 1


class Moment(NamedTuple):
    """What a stage holds during one computation, for each of its chunks.

    ``whole`` activations between their F and the end of their B, ``waiting`` between B and the end
    of W (empty: not split); ``heads`` outputs of the model's last part between F and B.
    """

    whole: tuple[int, ...]
    waiting: tuple[int, ...]
    heads: int


def schedule_of(run: Run) -> Schedule:
    """The schedule this run executes, balanced or offloaded if it says so.

    Without a flush: as many iterations as show what repeats.

    Raises EstimateError where it cannot: a budget that is too small, or interleaving with a number
    of micro-batches that is no multiple of p.
    """
    return _schedule(_shape(run))


def lowered_of(run: Run, iterations: int | None = None) -> Schedule:
    """The same lowered; ``iterations`` between two flushes, where there is none else."""
    shape = _shape(run)
    return _lowered(shape if iterations is None else shape._replace(iterations=iterations))


def iterations_until_steady(run: Run) -> int:
    """Without a flush: iterations after which one more shows nothing that was not there before."""
    p = run.layout.pp
    return 1 + -(-2 * p // run.micro_batches) + p


def held_by_stage(run: Run) -> tuple[tuple[int, int], ...]:
    """For each stage: most activations of its own there, and most that it has on its partner.

    Raises EstimateError.
    """
    return _held(_short(_shape(run)))


def moments_by_stage(run: Run) -> tuple[tuple[Moment, ...], ...]:
    """For each stage what it holds, at those of its computations that no other one covers.

    Raises EstimateError.
    """
    return _moments(_short(_shape(run)))


def budgets_of(run: Run) -> tuple[float, ...]:
    """All budgets of BPipe on this run, largest first: from what evicts nothing to the least.

    Raises EstimateError where its schedule does not exist.
    """
    alone = replace(run, bpipe=False, budget=None)
    held = held_by_stage(alone)[0][0]
    least = units(_least_budget(_short(_shape(alone))), run.chunks)
    return tuple(microbatches(n, run.chunks) for n in range(held, least - 1, -1))


def _short(shape: _Shape) -> _Shape:
    """As few micro-batches as show all that a stage ever holds: from 4 p on it repeats (tested).

    V shapes repeat one block, which is over within 2 p.
    """
    p, m = shape.p, shape.m
    if CATALOGUE[shape.name].v_placed:
        return shape._replace(m=min(m, 3 * p))
    if m <= 5 * p or shape.name in _ALL_AT_ONCE:
        return shape
    return shape._replace(m=4 * p + m % p)


_ALL_AT_ONCE = ("gpipe", "gpipe-lifo", "continuous")
"""Schedules that hold more the more micro-batches there are."""


def _shape(run: Run) -> _Shape:
    p, m = run.layout.pp, run.micro_batches
    iterations = 1 if run.entry.without_flush is None else iterations_until_steady(run)
    return _Shape(p, m, run.base, run.chunks, run.bpipe, run.host, run.budget, iterations)


@lru_cache(maxsize=64)
def _schedule(shape: _Shape) -> Schedule:
    p, m, name, chunks, bpipe, host, budget, iterations = shape
    without_flush = CATALOGUE[name].without_flush
    try:
        if host:
            return offload(one_f_one_b(p, m), int(budget or default_budget(p)))
        if without_flush is not None:
            return without_flush.run(p, m, iterations)
        return make(ScheduleSpec(name, p, m, chunks, balanced=bpipe, budget=budget))
    except ValueError as error:
        raise EstimateError(str(error)) from error


@lru_cache(maxsize=4096)
def _least_budget(shape: _Shape) -> float:
    return least_budget(_schedule(shape))


@lru_cache(maxsize=64)
def _lowered(shape: _Shape) -> Schedule:
    return lower(_schedule(shape))


@lru_cache(maxsize=4096)
def _held(shape: _Shape) -> tuple[tuple[int, int], ...]:
    return held_in(_schedule(shape))


@lru_cache(maxsize=4096)
def _moments(shape: _Shape) -> tuple[tuple[Moment, ...], ...]:
    schedule = _schedule(shape)
    head = 0 if CATALOGUE[shape.name].v_placed else shape.p - 1
    return tuple(
        _fullest(_of_line(line, schedule.chunks, stage == head))
        for stage, line in enumerate(schedule.stages)
    )


def _of_line(line: Sequence[Op], chunks: int, has_head: bool) -> set[Moment]:
    """Every different moment of a stage; transfers in flight count, as in `occupancy`."""
    whole, waiting, heads = [0] * chunks, [0] * chunks, 0
    leaving: list[int] = []
    found = set()
    for op in line:
        kind, chunk = op.kind, op.chunk
        if kind is Kind.EVICT:
            leaving.append(chunk)
        elif kind is Kind.LOAD or kind is Kind.FORWARD:
            whole[chunk] += 1
        ends_model = has_head and chunk == chunks - 1
        if not kind.computation:
            continue
        heads -= ends_model and kind is Kind.BACKWARD
        found.add(Moment(tuple(whole), tuple(waiting), heads))
        heads += ends_model and kind is Kind.FORWARD
        if kind is Kind.BACKWARD:
            whole[chunk] -= 1
            waiting[chunk] += 1
        elif kind is Kind.WEIGHT:
            waiting[chunk] -= 1
        for one in leaving:
            whole[one] -= 1
        leaving.clear()
    return found


def _fullest(moments: set[Moment]) -> tuple[Moment, ...]:
    """Those that no other one has at least as much of everything as."""

    def flat(moment: Moment) -> tuple[int, ...]:
        return *moment.whole, *moment.waiting, moment.heads

    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda one: -sum(flat(one))):
        if not any(all(a >= b for a, b in zip(flat(k), flat(moment))) for k in kept):  # noqa: B905
            kept.append(moment)
    return tuple(kept)


def held_in(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """For each stage: most activations of its own there, and most that it has on its partner."""
    counts = [occupancy(line) for line in schedule.stages]
    remote = [0 if schedule.to_host else max(lent, default=0) for _, lent in counts]
    return tuple((max(own, default=0), r) for (own, _), r in zip(counts, remote, strict=True))
