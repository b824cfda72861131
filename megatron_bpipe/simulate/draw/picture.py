"""What is drawn, whoever draws it: boxes on lanes, moves between lanes, memory curves below.

A panel is one run, simulated (``panel_of``) or recorded (``recorded.panel``).  A panel may carry a
``ghost``, another run of the same schedule drawn behind it: prediction and measurement lie over
each other.

Units: seconds from the start of the iteration; memory in bytes, or micro-batches where no sizes
are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_bpipe.schedule.ops import HOST, UP, Kind, Op, partner
from megatron_bpipe.schedule.validation.occupancy import lent
from megatron_bpipe.simulate.memory import StageBytes, memory_steps, share
from megatron_bpipe.simulate.result import Simulation, bubble_ratio


@dataclass(frozen=True)
class Box:
    """A computation on a stage."""

    stage: int
    op: str
    kind: str  # F, B or W
    microbatch: int
    chunk: int
    up: bool
    start: float
    end: float


@dataclass(frozen=True)
class Move:
    """A copy between two stages (``target`` None: the host's memory)."""

    op: str
    kind: str  # E or L
    microbatch: int
    source: int | None
    target: int | None
    start: float
    end: float
    size: int


@dataclass(frozen=True)
class Curve:
    """Memory of one stage: constant parts by name, and (time, resident, in flight) steps.

    ``budget`` is the height that the schedule's budget allows on this stage, None without one.
    """

    stage: int
    constant: tuple[tuple[str, float], ...]
    steps: tuple[tuple[float, float, float], ...]
    budget: float | None = None

    @property
    def peak(self) -> float:
        """Most at any time."""
        return sum(v for _, v in self.constant) + max((a + b for _, a, b in self.steps), default=0)


@dataclass(frozen=True)
class Panel:
    """One run."""

    title: str
    facts: tuple[tuple[str, str], ...]
    stages: int
    end: float
    boxes: tuple[Box, ...]
    moves: tuple[Move, ...]
    curves: tuple[Curve, ...]
    ghost: Panel | None = None


@dataclass(frozen=True)
class Picture:
    """Panels side by side; ``unit`` of memory is "bytes" or "micro-batches", of time "s" or ""."""

    panels: tuple[Panel, ...]
    memory_unit: str
    time_unit: str

    @property
    def end(self) -> float:
        """The longest panel's end: all share one axis."""
        return max(max(p.end, p.ghost.end if p.ghost else 0.0) for p in self.panels)

    @property
    def most_memory(self) -> float:
        """The highest curve or budget: all share one axis."""
        panels = [q for p in self.panels for q in (p, p.ghost) if q is not None]
        curves = [c for p in panels for c in p.curves]
        return max((max(c.peak, c.budget or 0.0) for c in curves), default=0.0)


def panel_of(
    simulation: Simulation,
    sizes: Sequence[StageBytes] | None = None,
    title: str | None = None,
    time_unit: str = "",
) -> Panel:
    """A simulated run; without ``sizes`` memory is counted in micro-batches."""
    schedule = simulation.schedule
    curves = _curves(simulation, sizes)
    known = sizes is not None
    peak = max((curve.peak for curve in curves), default=0.0)
    facts = [
        ("iteration", time_text(simulation.seconds, time_unit)),
        ("bubble", f"{100 * bubble_ratio(simulation):.1f} %"),
        ("peak", memory_text(peak, "bytes" if known else "micro-batches")),
    ]
    moves = tuple(_moves(simulation, sizes))
    if moves:
        facts.append(("evictions", str(sum(move.kind == "E" for move in moves))))
    return Panel(
        title=title or schedule.name,
        facts=tuple(facts),
        stages=schedule.p,
        end=simulation.pipeline_seconds,
        boxes=tuple(_boxes(simulation)),
        moves=moves,
        curves=tuple(curves),
    )


def box_of(op: Op, stage: int, start: float, end: float) -> Box:
    """The box of a computation."""
    return Box(
        stage, str(op), op.kind.value, op.microbatch, op.chunk, op.direction is UP, start, end
    )


def move_of(
    op: Op, stage: int, to_host: bool, p: int, span: tuple[float, float], size: int
) -> Move:
    """The move of an eviction or load (or of the wait for it)."""
    other = None if to_host else partner(stage, p)
    if op.other is not None:
        other = None if op.other == HOST else op.other
    leaves = op.kind in (Kind.EVICT, Kind.EVICT_WAIT)
    source, target = (stage, other) if leaves else (other, stage)
    kind = Kind.EVICT if leaves else Kind.LOAD
    name = str(Op(kind, op.microbatch, op.chunk, op.direction, part=op.part))
    return Move(name, kind.value, op.microbatch, source, target, *span, size)


def whole_boxes(stage: int, computed: Iterable[tuple[Op, float, float]]) -> Iterator[Box]:
    """The boxes of a stage's computations; a backward that ran part by part is one box."""
    begun: float | None = None
    for op, start, end in computed:
        if op.kind.computation:
            begun = start if begun is None else begun
            if not op.part:
                yield box_of(op._replace(part=None), stage, begun, end)
                begun = None


def _boxes(simulation: Simulation) -> list[Box]:
    boxes: list[Box] = []
    for stage, line in enumerate(simulation.schedule.stages):
        times = zip(line, simulation.starts[stage], simulation.ends[stage], strict=True)
        boxes += whole_boxes(stage, times)
    return boxes


def _moves(simulation: Simulation, sizes: Sequence[StageBytes] | None) -> list[Move]:
    out, schedule = [], simulation.schedule
    for transfer in simulation.transfers:
        stage, op = transfer.stage, transfer.op
        size = 0
        if sizes is not None:
            size = share(sizes[stage].leaving(op.chunk), op.moved[1], schedule.parts)
        span = (transfer.start, transfer.end)
        out.append(move_of(op, stage, schedule.to_host, schedule.p, span, size))
    return out


def _curves(simulation: Simulation, sizes: Sequence[StageBytes] | None) -> list[Curve]:
    schedule = simulation.schedule
    chunks = schedule.chunks
    # without sizes a micro-batch of a whole stage is as many as there are units in it
    unit = 1 / schedule.grain if sizes is None else 1.0
    given = (StageBytes((schedule.parts,)),) * schedule.p if sizes is None else tuple(sizes)
    curves = []
    for stage, memory in enumerate(memory_steps(simulation, given)):
        constant = (
            ("weights", float(memory.weights)),
            ("gradients", float(memory.gradients)),
            ("optimizer", float(memory.optimizer)),
            ("pool", unit * memory.pool),
        )
        steps = tuple((time, unit * a, unit * b) for time, a, b in memory.steps)
        budget = None
        if schedule.budget is not None:
            activations = given[stage].activation
            whole = sum(activations[min(chunk, len(activations) - 1)] for chunk in range(chunks))
            own = schedule.budget - lent(schedule, stage) / schedule.grain
            budget = unit * (memory.constant + own * whole)
        curves.append(Curve(stage, tuple((n, v) for n, v in constant if v), steps, budget))
    return curves


def time_text(value: float, unit: str) -> str:
    """A time for people: 12.3 ms, 1.23 s, or 22 without a unit."""
    if unit != "s":
        return f"{value:.4g}"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def memory_text(value: float, unit: str) -> str:
    """A size for people: 3.2 GiB, 17 MiB, 4.5 micro-batches."""
    if unit != "bytes":
        shown = f"{value:.3g}"
        return f"{shown} {unit.removesuffix('es') if shown == '1' else unit}"
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:.3g} {name}"
    return f"{value:.0f} B"
