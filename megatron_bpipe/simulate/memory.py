"""Memory of each stage over time.

Weights, gradients and optimizer state are there all the time, the weights once for each version
that the schedule keeps and once for each direction whose layers the stage has.  An acceptor's pool
is there all the time too, for the most activations its evictors ever have in it.  An activation is
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
from megatron_bpipe.schedule.validation.occupancy import borrowed
from megatron_bpipe.simulate.result import Simulation


@dataclass(frozen=True)
class StageBytes:
    """One stage's sizes.

    ``activation`` by chunk (one entry: the same for all); ``moved`` what of it an eviction takes
    away (None: all); ``kept_for_weight`` what W needs after B, as a share of it
    (above 1 where the layers are recomputed: B makes more than F kept).  For Chimera give
    the sizes of one direction's layers.
    """

    activation: tuple[int, ...]
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    moved: int | None = None
    kept_for_weight: float = 1.0


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
            borrowed(schedule, x, stage) * _slot(schedule, sizes[x]) // schedule.parts
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
            moved = share(_moved(size, op.chunk), op.moved[1], parts)
            resident, flying = resident - moved, flying + moved
        elif kind is Kind.EVICT_WAIT:
            flying -= share(_moved(size, op.chunk), op.moved[1], parts)
        elif kind is Kind.LOAD:
            flying += share(_moved(size, op.chunk), op.moved[1], parts)
        elif kind is Kind.LOAD_WAIT:
            moved = share(_moved(size, op.chunk), op.moved[1], parts)
            resident, flying = resident + moved, flying - moved
        else:
            continue
        steps.append((time, resident, flying))
    return tuple(steps)


def share(size: int, part: int, parts: int) -> int:
    """The bytes of one of ``parts`` equal parts; all of them together are ``size``."""
    return size * (part + 1) // parts - size * part // parts


def _whole(size: StageBytes, op: Op) -> int:
    return size.activation[op.chunk if op.chunk < len(size.activation) else -1]


def _for_weight(size: StageBytes, op: Op) -> int:
    return round(_whole(size, op) * size.kept_for_weight)


def _moved(size: StageBytes, chunk: int) -> int:
    if size.moved is not None:
        return size.moved
    return size.activation[chunk if chunk < len(size.activation) else -1]


def _slot(schedule: Schedule, size: StageBytes) -> int:
    """Bytes of one slot: of chunk 0, or, where loans are worked out from bytes, of the largest."""
    if schedule.loans is None:
        return _moved(size, 0)
    return max(_moved(size, chunk) for chunk in range(len(size.activation)))
