"""A picture as a Chrome trace (chrome://tracing, ui.perfetto.dev).

One process a panel; for each stage a thread of computations and one of copies, a copy as a slice
on both of its stages with a flow arrow from where it comes to where it goes, and a counter of
memory.  Times in microseconds, as the format wants; without a time unit 1 is drawn as 1 ms.

Format: "Trace Event Format", github.com/google/perfetto, docs for external formats.
"""

from __future__ import annotations

from typing import Any

from megatron_bpipe.simulate.draw.picture import Move, Panel, Picture

Trace = dict[str, Any]
TRACKS = 1000
"""Numbers of tracks a stage has: its computations, then its copies."""


def chrome_trace(picture: Picture) -> Trace:
    """The trace as one JSON document."""
    scale = 1e6 if picture.time_unit == "s" else 1e3
    events: list[Trace] = []
    for number, panel in enumerate(picture.panels):
        for offset, one in enumerate(p for p in (panel, panel.ghost) if p is not None):
            events += _panel_events(one, 2 * number + offset + 1, scale, picture.memory_unit)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _panel_events(panel: Panel, pid: int, scale: float, unit: str) -> list[Trace]:
    events: list[Trace] = [_name("process_name", pid, 0, panel.title)]
    for box in panel.boxes:
        args = {"micro-batch": box.microbatch, "chunk": box.chunk}
        tid = TRACKS * box.stage
        events.append(_complete(box.op, box.kind, pid, tid, box.start, box.end, scale, args))
    copies = _Copies(panel, pid, scale)
    for number, move in enumerate(sorted(panel.moves, key=lambda move: move.start)):
        events += copies.slices(number, move)
    for stage in range(panel.stages):
        events.append(_name("thread_name", pid, TRACKS * stage, f"stage {stage}"))
        for track in range(len(copies.busy[stage])):
            again = f" ({track + 1})" if track else ""
            name = f"stage {stage} copies{again}"
            events.append(_name("thread_name", pid, TRACKS * stage + 1 + track, name))
    for curve in panel.curves:
        constant = sum(value for _, value in curve.constant)
        for time, resident, flying in curve.steps:
            values = {"resident": constant + resident, "in flight": flying}
            name = f"memory of stage {curve.stage} ({unit})"
            events.append({"name": name, "ph": "C", "pid": pid, "ts": scale * time, "args": values})
    return events


class _Copies:
    """Slices of copies on both ends, and the arrows between them.

    Slices of one track may not overlap, so a stage has as many tracks as copies at one time. An
    arrow begins and ends inside a slice: viewers drop those that do not.
    """

    def __init__(self, panel: Panel, pid: int, scale: float) -> None:
        self.pid, self.scale = pid, scale
        self.shortest = panel.end * 1e-6 or 1e-6  # an instant copy gets a slice all the same
        self.busy: list[list[float]] = [[] for _ in range(panel.stages)]  # each track's end

    def slices(self, number: int, move: Move) -> list[Trace]:
        """Those of one move; call it in the order of their starts. ``number`` names the arrow."""
        end = max(move.end, move.start + self.shortest)
        args = {"micro-batch": move.microbatch, "bytes": move.size}
        tids = {}
        events = []
        for stage in (move.source, move.target):
            if stage is None:
                continue
            mine = stage == (move.source if move.kind == "E" else move.target)
            name = move.op if mine else f"{move.op} of stage {_owner(move)}"
            tids[stage] = self._track(stage, move.start, end)
            events.append(
                _complete(name, move.kind, self.pid, tids[stage], move.start, end, self.scale, args)
            )
        if move.source is not None and move.target is not None:
            flow = {"name": move.op, "cat": "copy", "id": f"{self.pid}.{number}", "pid": self.pid}
            middle = (move.start + end) / 2
            for phase, stage, time in (("s", move.source, move.start), ("f", move.target, middle)):
                at = {"ph": phase, "tid": tids[stage], "ts": self.scale * time, "bp": "e"}
                events.append(flow | at)
        return events

    def _track(self, stage: int, start: float, end: float) -> int:
        """The stage's first track that is free then."""
        tracks = self.busy[stage]
        free = next((n for n, until in enumerate(tracks) if until <= start), len(tracks))
        if free == len(tracks):
            tracks.append(end)
        tracks[free] = end
        return TRACKS * stage + 1 + free


def _owner(move: Move) -> int | None:
    return move.source if move.kind == "E" else move.target


def _complete(
    name: str,
    category: str,
    pid: int,
    tid: int,
    start: float,
    end: float,
    scale: float,
    args: Trace,
) -> Trace:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": scale * start,
        "dur": scale * (end - start),
        "args": args,
    }


def _name(what: str, pid: int, tid: int, name: str) -> Trace:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
