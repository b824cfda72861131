"""A panel as text, for any costs: one character a slice of time.

A slice shows the last digit of the micro-batch computed in most of it, forwards as digits,
backwards as letters (a is micro-batch 0), weight gradients as ``w``, ``.`` idle; below an evictor
``>`` while an eviction runs and ``<`` while a load does (``x``: both).  On the right the peak of
memory.
"""

from __future__ import annotations

from megatron_bpipe.simulate.draw.picture import Panel, memory_text, time_text


def draw_panel(panel: Panel, width: int, memory_unit: str, time_unit: str) -> str:
    """The panel in lines of at most ``width`` characters (at least 40)."""
    label = len(str(panel.stages - 1)) + 2
    tails = {c.stage: "  " + memory_text(c.peak, memory_unit) for c in panel.curves}
    columns = max(40, width) - label - max(map(len, tails.values()), default=0)
    slice_ = panel.end / columns if panel.end else 1.0
    facts = ", ".join(f"{name} {value}" for name, value in panel.facts)
    out = [f"{panel.title}: {facts}"]
    for stage in range(panel.stages):
        lane = _lane(panel, stage, columns, slice_)
        out.append(f"{stage}".rjust(label - 2) + ": " + lane + tails.get(stage, ""))
        copies = _copies(panel, stage, columns, slice_)
        if copies.strip():
            out.append((" " * label + copies).rstrip())
    out.append(
        f"one column is {time_text(slice_, time_unit)}; digits forward, letters backward, w weight "
        "gradients, > evict, < load"
    )
    return "\n".join(out)


def _lane(panel: Panel, stage: int, columns: int, slice_: float) -> str:
    most = [0.0] * columns
    text = ["."] * columns
    for box in panel.boxes:
        if box.stage != stage:
            continue
        first = int(box.start / slice_)
        for column in range(first, min(columns, int(box.end / slice_) + 1)):
            begin, end = column * slice_, (column + 1) * slice_
            share = min(end, box.end) - max(begin, box.start)
            if share > most[column] and share > slice_ / 4:
                most[column], text[column] = share, _sign(box.kind, box.microbatch)
    return "".join(text)


def _sign(kind: str, microbatch: int) -> str:
    if kind == "F":
        return str(microbatch % 10)
    return "abcdefghij"[microbatch % 10] if kind == "B" else "w"


def _copies(panel: Panel, stage: int, columns: int, slice_: float) -> str:
    text = [" "] * columns
    for move in panel.moves:
        if stage != (move.source if move.kind == "E" else move.target):
            continue
        sign = ">" if move.kind == "E" else "<"
        first, last = int(move.start / slice_), int(move.end / slice_)
        for column in range(first, min(columns, max(first + 1, last))):
            text[column] = sign if text[column] in (" ", sign) else "x"
    return "".join(text)
