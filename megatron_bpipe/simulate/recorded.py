"""A recorded run (the files of ``--bpipe-report``) as a panel, and what it says ops cost.

Units: seconds from the start of the iteration that is drawn, bytes.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bpipe.schedule.ops import Kind, Op, partner
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.draw.picture import (
    Box,
    Curve,
    Move,
    Panel,
    box_of,
    memory_text,
    move_of,
    time_text,
)
from megatron_bpipe.simulate.memory import StageBytes


class ReportError(ValueError):
    """A folder that holds no report; says what is missing."""


@dataclass(frozen=True)
class Event:
    """One op of the recorded iteration."""

    op: Op
    start: float
    end: float
    size: int
    live_bytes: int
    live: int
    copy: tuple[float, float] | None


@dataclass(frozen=True)
class Recording:
    """The last iteration of a run; one rank of each stage."""

    stages: tuple[tuple[Event, ...], ...]
    pool_bytes: tuple[int, ...]
    pool_slots: tuple[int, ...]
    bpipe: bool
    budget: int | None
    seconds: float

    @property
    def microbatches(self) -> int:
        """Micro-batches of the iteration (m)."""
        return sum(event.op.kind is Kind.FORWARD for event in self.stages[0])


def read_report(folder: Path) -> Recording:
    """Read a report folder; raises ReportError naming what is missing or unreadable."""
    memory = _read(folder / "memory.json")
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("timeline-stage*.json"), reverse=True):
        files[int(path.name[len("timeline-stage") :].split("-")[0])] = path  # the lowest rank
    p = len(memory["stages"])
    missing = sorted(set(range(p)) - set(files))
    if missing:
        raise ReportError(
            f"{folder}: memory.json has {p} stages but there is no timeline of stage {missing[0]}; "
            "point to the folder that --bpipe-report wrote, all its files together"
        )
    try:
        last = [_read(files[stage])["iterations"][-1] for stage in range(p)]
        zero = min(event["start"] for events in last for event in events)
        stages = tuple(tuple(_event(event, zero) for event in events) for events in last)
        end = max(event.end for events in stages for event in events)
        return Recording(
            stages,
            tuple(stage["pool_bytes"] for stage in memory["stages"]),
            tuple(stage["pool_slots"] for stage in memory["stages"]),
            memory["bpipe"],
            memory["budget"],
            end,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ReportError(
            f"{folder}: not what --bpipe-report writes ({type(error).__name__}: {error}); record "
            "again with this version"
        ) from error


def panel(recording: Recording, title: str) -> Panel:
    """The recording as a panel."""
    boxes: list[Box] = []
    moves: list[Move] = []
    curves: list[Curve] = []
    p = len(recording.stages)
    for stage, events in enumerate(recording.stages):
        sizes = {event.op.microbatch: event.size for event in events if event.size}
        steps = [(0.0, 0.0, 0.0)]
        for event in events:
            if event.op.kind.computation:
                boxes.append(box_of(event.op, stage, event.start, event.end))
            if event.copy is not None:
                size = sizes.get(event.op.microbatch, 0)
                moves.append(move_of(event.op, stage, None, p, event.copy, size))
            steps.append((event.end, float(event.live_bytes), 0.0))
        pool = recording.pool_bytes[stage]
        constant = (("pool", float(pool)),) if pool else ()
        curves.append(Curve(stage, constant, tuple(steps)))
    busy = sum(box.end - box.start for box in boxes)
    facts = [
        ("iteration", time_text(recording.seconds, "s")),
        ("bubble", f"{100 * (1 - busy / (p * recording.seconds)):.1f} %"),
        ("peak", memory_text(max(curve.peak for curve in curves), "bytes")),
    ]
    if moves:
        facts.append(("evictions", str(sum(move.kind == "E" for move in moves))))
    return Panel(
        title, tuple(facts), p, recording.seconds, tuple(boxes), tuple(moves), tuple(curves), None
    )


def measured_costs(recording: Recording) -> Costs:
    """Means of what each stage's ops took: a simulation with these is the prediction.

    A message's own time is what the shortest of them took, since all others also waited.
    """
    stages = []
    sends: list[float] = []
    for events in recording.stages:
        took: dict[Kind, list[float]] = {}
        for event in events:
            took.setdefault(event.op.kind, []).append(event.end - event.start)
        copies: dict[Kind, list[float]] = {}
        for event in events:
            if event.copy is not None:
                copies.setdefault(event.op.kind, []).append(event.copy[1] - event.copy[0])
        for kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD):
            sends += took.get(kind, [])
        stages.append(
            StageCosts(
                forward=(statistics.fmean(took[Kind.FORWARD]),),
                backward=(statistics.fmean(took[Kind.BACKWARD]),),
                evict=statistics.fmean(copies.get(Kind.EVICT_WAIT, [0.0])),
                load=statistics.fmean(copies.get(Kind.LOAD_WAIT, [0.0])),
            )
        )
    return Costs(tuple(stages), send=min(sends, default=0.0))


def measured_bytes(recording: Recording) -> tuple[StageBytes, ...]:
    """Bytes of one micro-batch on each stage: the highest live bytes over those then alive."""
    p = len(recording.stages)
    out = []
    for stage, events in enumerate(recording.stages):
        top = max(events, key=lambda event: event.live_bytes)
        activation = round(top.live_bytes / max(1, top.live))
        other = partner(stage, p)
        slots = recording.pool_slots[other] if other is not None else 0
        pool = recording.pool_bytes[other] if other is not None else 0
        out.append(StageBytes((activation,), moved=round(pool / slots) if slots else None))
    return tuple(out)


def _event(event: dict[str, Any], zero: float) -> Event:
    copy = None
    if event["copy_start"] is not None:
        copy = event["copy_start"] - zero, event["copy_end"] - zero
    return Event(
        Op.parse(event["op"]),
        event["start"] - zero,
        event["end"] - zero,
        event["bytes"],
        event["live_bytes"],
        event["live_microbatches"],
        copy,
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"{path}: {error.strerror}; point to a folder that --bpipe-report wrote"
        ) from error
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}); record again") from error
