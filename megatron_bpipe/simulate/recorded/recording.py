"""A recorded run (the files of ``--bpipe-report``) as a panel, and what it says ops cost.

Units: seconds from the start of the iteration that is drawn, bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_bpipe.report.fields import AGAIN, ReportError
from megatron_bpipe.report.run import RunReport, read_run
from megatron_bpipe.report.timeline import Event, read_timelines
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE
from megatron_bpipe.schedule.ops import Kind, Op, partner
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.draw.picture import (
    Box,
    Curve,
    Move,
    Panel,
    memory_text,
    move_of,
    time_text,
    whole_boxes,
)
from megatron_bpipe.simulate.memory import StageBytes


@dataclass(frozen=True)
class Seen:
    """One op of the recorded iteration, on the iteration's own clock."""

    op: Op
    start: float
    end: float
    size: int
    live_bytes: int
    live: float
    copy: tuple[float, float] | None
    exposed: float | None


@dataclass(frozen=True)
class Recording:
    """One iteration of a run, one rank of each stage, and the whole run's report."""

    stages: tuple[tuple[Seen, ...], ...]
    run: RunReport
    seconds: float

    @property
    def microbatches(self) -> int:
        """Micro-batches of the iteration (m)."""
        return len({s.op.microbatch for s in self.stages[0] if s.op.kind is Kind.FORWARD})

    @property
    def pool_bytes(self) -> tuple[int, ...]:
        """What each stage lends."""
        return tuple(stage.pool_bytes for stage in self.run.stages)


def read_report(folder: Path) -> Recording:
    """Read a report folder; of its iterations the one that took the median time.

    Only iterations with the last one's ops are looked at: balance by measured peaks runs the first
    iteration by the paper's rule, and the peaks of the run are those of its own loans.

    Under a schedule without a flush all that were recorded, one after the other: what one stage
    does in an iteration lies beside the next iteration of another.

    Raises:
        ReportError: naming what is missing, unreadable or of another version.
    """
    run = read_run(folder)
    timelines = read_timelines(folder, run.p)
    count = min(len(timeline.iterations) for timeline in timelines)
    try:
        iterations = [
            [timeline.iterations[n - count] for timeline in timelines] for n in range(count)
        ]
        ran = [[[event.op for event in events] for events in stages] for stages in iterations]
        alike = [stages for stages, ops in zip(iterations, ran, strict=True) if ops == ran[-1]]
        chosen = sorted(alike, key=lambda stages: _span(stages)[1])[(len(alike) - 1) // 2]
        if _goes_on(run):
            chosen = [list(chain.from_iterable(stage)) for stage in zip(*iterations, strict=True)]
        zero, seconds = _span(chosen)
        stages = tuple(tuple(_seen(event, zero) for event in events) for events in chosen)
    except (IndexError, ValueError) as error:
        raise ReportError(f"{folder}: its timelines are no iteration ({error}); {AGAIN}") from error
    return Recording(stages, run, seconds)


def _goes_on(run: RunReport) -> bool:
    entry = CATALOGUE.get(run.schedule)
    return entry is not None and entry.without_flush is not None


def _span(iteration: Sequence[Sequence[Event]]) -> tuple[float, float]:
    """When an iteration began, and how many seconds it took until the last stage was done."""
    zero = min(event.start for events in iteration for event in events)
    return zero, max(event.end for events in iteration for event in events) - zero


def panel(recording: Recording, title: str) -> Panel:
    """The recording as a panel."""
    boxes: list[Box] = []
    moves: list[Move] = []
    curves: list[Curve] = []
    p = len(recording.stages)
    units = measured_bytes(recording)
    for stage, events in enumerate(recording.stages):
        sizes = {event.op.moved: event.size for event in events if event.size}
        boxes += whole_boxes(stage, ((event.op, event.start, event.end) for event in events))
        to_host = recording.run.stages[stage].transport == "host"
        steps = [(0.0, 0.0, 0.0)]
        for event in events:
            if event.copy is not None:
                size = sizes.get(event.op.moved, 0)
                moves.append(move_of(event.op, stage, to_host, p, event.copy, size))
            steps.append((event.end, float(event.live_bytes), 0.0))
        pool = recording.pool_bytes[stage]
        constant = (("pool", float(pool)),) if pool else ()
        budget = None
        if recording.run.budget is not None:
            own = recording.run.budget - recording.run.stages[stage].pool_slots
            budget = pool + own * recording.run.v * units[stage].activation[0]
        curves.append(Curve(stage, constant, tuple(steps), budget))
    busy = sum(box.end - box.start for box in boxes)
    facts = [
        ("iteration", time_text(recording.seconds, "s")),
        ("bubble", f"{100 * (1 - busy / (p * recording.seconds)):.1f} %"),
        ("peak", memory_text(max(curve.peak for curve in curves), "bytes")),
    ]
    if moves:
        facts.append(("evictions", str(sum(move.kind == "E" for move in moves))))
    return Panel(
        title, tuple(facts), p, recording.seconds, tuple(boxes), tuple(moves), tuple(curves)
    )


def measured_costs(recording: Recording) -> Costs:
    """Means of what each stage's ops took: a simulation with these is the prediction.

    A message's own time is what the shortest of them took, since all others also waited.
    """
    stages = []
    parts = recording.run.parts  # costs are those of whole activations
    sends: list[float] = []
    for events in recording.stages:
        took: dict[Kind, list[float]] = {}
        computed: dict[tuple[Kind, int], list[float]] = {}
        for event in events:
            took.setdefault(event.op.kind, []).append(event.end - event.start)
        for box in whole_boxes(0, ((event.op, event.start, event.end) for event in events)):
            computed.setdefault((Kind(box.kind), box.chunk), []).append(box.end - box.start)
        copies: dict[Kind, list[float]] = {}
        for event in events:
            if event.copy is not None:
                copies.setdefault(event.op.kind, []).append(event.copy[1] - event.copy[0])
        for kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD):
            sends += took.get(kind, [])
        stages.append(
            StageCosts(
                forward=_by_chunk(computed, Kind.FORWARD),
                backward=_by_chunk(computed, Kind.BACKWARD),
                weight=_by_chunk(computed, Kind.WEIGHT) or (0.0,),
                evict=parts * statistics.fmean(copies.get(Kind.EVICT_WAIT, [0.0])),
                load=parts * statistics.fmean(copies.get(Kind.LOAD_WAIT, [0.0])),
            )
        )
    return Costs(tuple(stages), send=min(sends, default=0.0))


def _by_chunk(
    computed: Mapping[tuple[Kind, int], Sequence[float]], kind: Kind
) -> tuple[float, ...]:
    """Mean seconds of this stage's ops of a kind, chunk by chunk."""
    chunks = sorted(chunk for found, chunk in computed if found is kind)
    return tuple(statistics.fmean(computed[kind, chunk]) for chunk in chunks)


def measured_bytes(recording: Recording) -> tuple[StageBytes, ...]:
    """Bytes of one chunk on each stage: the highest live bytes over the chunks then alive.

    Where the backward is split, this is taken before the first one: later some of those alive are
    what waits for W.
    """
    p, v = len(recording.stages), recording.run.v
    out = []
    for stage, events in enumerate(recording.stages):
        split = any(event.op.kind is Kind.WEIGHT for event in events)
        first = next(n for n, event in enumerate(events) if event.op.kind is Kind.BACKWARD)
        top = max(events[:first] if split else events, key=lambda event: event.live_bytes)
        activation = round(top.live_bytes / max(1, top.live * v))
        own_loans = any(event.op.other is not None for event in events)
        other = None if own_loans else partner(stage, p)
        slots = recording.run.stages[other].pool_slots if other is not None else 0
        pool = recording.pool_bytes[other] if other is not None else 0
        moved = (round(pool / (slots * v)),) if slots else None
        left = recording.run.stages[stage].left_for_weight_bytes
        kept = left / activation if left is not None and activation else 1.0
        out.append(StageBytes((activation,), moved=moved, kept_for_weight=kept))
    return tuple(out)


def _seen(event: Event, zero: float) -> Seen:
    copy = None
    if event.copy_start is not None and event.copy_end is not None:
        copy = event.copy_start - zero, event.copy_end - zero
    return Seen(
        Op.parse(event.op),
        event.start - zero,
        event.end - zero,
        event.bytes,
        event.live_bytes,
        event.live_microbatches,
        copy,
        event.exposed,
    )
