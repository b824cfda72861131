"""Memory of each stage over time.

Weights, gradients and optimizer state are there all the time, the weights once for each version
that the schedule keeps and once for each direction whose layers the stage has.  An acceptor's pool
is there all the time too, for the most bytes its evictors ever have in it.  An activation is
allocated when its forward begins and freed when its backward ends (where the backward is split,
what W needs of it stays until W is over); on an evictor it is freed when EW is over and allocated
again when L begins.  Where an activation travels in parts each of them is an equal share of it,
and a backward that is written part by part frees one after the other.  While a transfer runs its
bytes are counted as in flight, on the stage whose activation it is; the acceptor's side of it lies
in the pool.

Units: bytes; seconds from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bpipe.schedule.bases.pipedream import weight_versions
from megatron_bpipe.schedule.ops import Kind, Op, Schedule, borrowers
from megatron_bpipe.schedule.validation.occupancy import remote_bytes, transfers_with
from megatron_bpipe.simulate.result import Simulation


@dataclass(frozen=True)
class StageBytes:
    """One stage's sizes.

    ``activation`` by chunk (one entry: the same for all); ``moved`` what of it an eviction takes
    away, by chunk too (None: all); ``kept_for_weight`` what W needs after B, as a share of it
    (above 1 where the layers are recomputed: B makes more than F kept).  For Chimera give
    the sizes of one direction's layers.
    """

    activation: tuple[int, ...]
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    moved: tuple[int, ...] | None = None
    kept_for_weight: float = 1.0

    def leaving(self, chunk: int) -> int:
        """What an eviction takes away of an activation of this chunk."""
        return _of(self.activation if self.moved is None else self.moved, chunk)


@dataclass(frozen=True)
class StageMemory:
    """One stage: constant parts in bytes, and what changes as steps (time, resident, in flight)."""

    weights: int
    gradients: int
    optimizer: int
    pool: int
    steps: tuple[tuple[float, int, int], ...]

    @property
    def constant(self) -> int:
        """Everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.pool

    @property
    def peak_activations(self) -> int:
        """Most bytes of its own activations, in flight included."""
        return max((resident + flying for _, resident, flying in self.steps), default=0)

    @property
    def peak(self) -> int:
        """Most bytes altogether."""
        return self.constant + self.peak_activations


def even_bytes(p: int, activation: int, weights: int = 0) -> tuple[StageBytes, ...]:
    """Equal stages of one chunk."""
    return (StageBytes((activation,), weights=weights),) * p


def memory_peaks(simulation: Simulation, sizes: Sequence[StageBytes]) -> list[int]:
    """Most bytes on each stage."""
    return [memory.peak for memory in memory_steps(simulation, sizes)]


def memory_steps(simulation: Simulation, sizes: Sequence[StageBytes]) -> list[StageMemory]:
    """Memory of every stage over time; raises ValueError unless there are sizes for each."""
    schedule = simulation.schedule
    if len(sizes) != schedule.p:
        raise ValueError(
            f"sizes for {len(sizes)} stages, the schedule has {schedule.p}: give one each"
        )
    out = []
    for stage, size in enumerate(sizes):
        line = schedule.stages[stage]
        pool = sum(
            remote_bytes(transfers_with(schedule, x, stage), _by_part(schedule, sizes[x]))
            for x in borrowers(schedule, stage)
        )
        copies = len({op.direction for op in line if op.chunk == 0 and op.kind is Kind.FORWARD})
        out.append(
            StageMemory(
                weights=size.weights * weight_versions(line) * copies,
                gradients=size.gradients * copies,
                optimizer=size.optimizer * copies,
                pool=pool,
                steps=_steps(simulation, stage, size),
            )
        )
    return out


def _steps(
    simulation: Simulation, stage: int, size: StageBytes
) -> tuple[tuple[float, int, int], ...]:
    line, parts = simulation.schedule.stages[stage], simulation.schedule.parts
    split = any(op.kind is Kind.WEIGHT for op in line)
    resident = flying = 0
    steps = [(0.0, 0, 0)]
    for start, end, op in zip(simulation.starts[stage], simulation.ends[stage], line, strict=True):
        kind, time = op.kind, end
        if kind is Kind.FORWARD:
            resident, time = resident + _whole(size, op), start
        elif kind is Kind.BACKWARD:
            freed = _whole(size, op) - (_for_weight(size, op) if split else 0)
            resident -= freed if op.part is None else share(freed, op.part, parts)
        elif kind is Kind.WEIGHT:
            resident -= _for_weight(size, op)
        elif kind is Kind.EVICT:
            moved = share(size.leaving(op.chunk), op.moved[1], parts)
            resident, flying = resident - moved, flying + moved
        elif kind is Kind.EVICT_WAIT:
            flying -= share(size.leaving(op.chunk), op.moved[1], parts)
        elif kind is Kind.LOAD:
            flying += share(size.leaving(op.chunk), op.moved[1], parts)
        elif kind is Kind.LOAD_WAIT:
            moved = share(size.leaving(op.chunk), op.moved[1], parts)
            resident, flying = resident + moved, flying - moved
        else:
            continue
        steps.append((time, resident, flying))
    return tuple(steps)


def share(size: int, part: int, parts: int) -> int:
    """The bytes of one of ``parts`` equal parts; all of them together are ``size``."""
    return size * (part + 1) // parts - size * part // parts


def _whole(size: StageBytes, op: Op) -> int:
    return _of(size.activation, op.chunk)


def _for_weight(size: StageBytes, op: Op) -> int:
    return round(_whole(size, op) * size.kept_for_weight)


def _of(sizes: Sequence[int], chunk: int) -> int:
    return sizes[chunk if chunk < len(sizes) else -1]


def _by_part(schedule: Schedule, size: StageBytes) -> dict[int, list[int]]:
    """Of each chunk the bytes of its parts."""
    parts = schedule.parts
    return {
        chunk: [share(size.leaving(chunk), part, parts) for part in range(parts)]
        for chunk in range(schedule.chunks)
    }
