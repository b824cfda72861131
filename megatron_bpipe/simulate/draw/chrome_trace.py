"""A picture as a Chrome trace (chrome://tracing, ui.perfetto.dev).

One process a panel; for each stage a thread of computations and one of copies, flow arrows from the
copy to the stage it goes to, and a counter of memory.  Times in microseconds, as the format wants;
without a time unit 1 is drawn as 1 ms.

Format: "Trace Event Format", github.com/google/perfetto, docs for external formats.
"""

from __future__ import annotations

from typing import Any

from megatron_bpipe.simulate.draw.picture import Panel, Picture

Trace = dict[str, Any]


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
    for stage in range(panel.stages):
        events.append(_name("thread_name", pid, 2 * stage, f"stage {stage}"))
        events.append(_name("thread_name", pid, 2 * stage + 1, f"stage {stage} copies"))
    for box in panel.boxes:
        args = {"micro-batch": box.microbatch, "chunk": box.chunk}
        events.append(_complete(box.op, box.kind, pid, 2 * box.stage, box, scale, args))
    for number, move in enumerate(panel.moves):
        here = move.source if move.kind == "E" else move.target
        there = move.target if move.kind == "E" else move.source
        assert here is not None, "one end of a copy is the stage whose activation it is"
        args = {"micro-batch": move.microbatch, "bytes": move.size}
        events.append(_complete(move.op, move.kind, pid, 2 * here + 1, move, scale, args))
        if there is not None:
            flow = {"name": move.op, "cat": "copy", "id": f"{pid}.{number}", "pid": pid}
            ends = (("s", here, move.start), ("f", there, move.end))
            for phase, stage, time in ends if move.kind == "E" else reversed(ends):
                events.append(
                    flow | {"ph": phase, "tid": 2 * stage + 1, "ts": scale * time, "bp": "e"}
                )
    for curve in panel.curves:
        constant = sum(value for _, value in curve.constant)
        for time, resident, flying in curve.steps:
            values = {"resident": constant + resident, "in flight": flying}
            name = f"memory of stage {curve.stage} ({unit})"
            events.append({"name": name, "ph": "C", "pid": pid, "ts": scale * time, "args": values})
    return events


def _complete(
    name: str, category: str, pid: int, tid: int, span: Any, scale: float, args: Trace
) -> Trace:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": scale * span.start,
        "dur": scale * (span.end - span.start),
        "args": args,
    }


def _name(what: str, pid: int, tid: int, name: str) -> Trace:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
