"""A panel as text, for any costs: every computation keeps at least one column.

Where the terminal is wide enough each computation begins with its name, ``F3--B0----``. Where it is
not, one sign a column says the last digit of the micro-batch: forwards as digits, backwards as
letters (a is micro-batch 0), weight gradients as ``w``, ``.`` idle. Where it is too narrow even for
that, one line says so: signs that stand for several computations would be misread. Below an evictor
``>`` while an eviction runs and ``<`` while a load does (``x``: both). On the right the peak of
memory.
"""

from __future__ import annotations

import math

from megatron_bpipe.simulate.draw.picture import Box, Panel, memory_text, time_text

NEAR = 1e-9  # of a column: sums of floats


def draw_panel(panel: Panel, width: int, memory_unit: str, time_unit: str) -> str:
    """The panel in lines of at most ``width`` characters (at least 40), the first one apart."""
    label = len(str(panel.stages - 1)) + 2
    tails = {c.stage: "  " + memory_text(c.peak, memory_unit) for c in panel.curves}
    room = max(40, width) - label - max(map(len, tails.values()), default=0)
    facts = ", ".join(f"{name} {value}" for name, value in panel.facts)
    out = [f"{panel.title}: {facts}"]
    needed = _columns_needed(panel, named=False)
    if needed > room:
        peaks = ", ".join(f"{stage}:{tail}" for stage, tail in tails.items())
        total = needed + max(40, width) - room
        out.append(f"peak by stage {peaks}")
        out.append(f"(too narrow to draw: needs {total} columns, has {width}; --html draws a page)")
        return "\n".join(out)
    for_names = _columns_needed(panel, named=True)
    named = 0 < for_names <= room
    whole = for_names if named else needed
    columns = whole * (room // whole) if whole else room
    slice_ = panel.end / columns if panel.end else 1.0
    for stage in range(panel.stages):
        boxes = [box for box in panel.boxes if box.stage == stage]
        lane = _named(boxes, columns, slice_) if named else _signs(boxes, columns, slice_)
        out.append(f"{stage}".rjust(label - 2) + ": " + lane + tails.get(stage, ""))
        copies = _copies(panel, stage, columns, slice_)
        if copies.strip():
            out.append((" " * label + copies).rstrip())
    words = "F forward, B backward, W" if named else "digits forward, letters backward, w"
    out.append(
        f"one column is {time_text(slice_, time_unit)}; {words} weight gradients, > evict, < load"
    )
    return "\n".join(out)


def _columns_needed(panel: Panel, *, named: bool) -> int:
    """Fewest columns in which each computation has one, or room for its name."""
    finest = math.inf
    for box in panel.boxes:
        if box.end > box.start:
            finest = min(finest, (box.end - box.start) / (len(box.op) if named else 1))
    return math.ceil(panel.end / finest - NEAR) if finest < math.inf else 0


def _named(boxes: list[Box], columns: int, slice_: float) -> str:
    """``F3--B0----``: each computation from the column in which it begins."""
    text = ["."] * columns
    for box in boxes:
        first = int(box.start / slice_ + NEAR)
        last = min(columns, max(first + len(box.op), int(box.end / slice_ + NEAR)))
        shown = box.op.ljust(last - first, "-")
        text[first:last] = shown[: last - first]
    return "".join(text)


def _signs(boxes: list[Box], columns: int, slice_: float) -> str:
    most = [0.0] * columns
    text = ["."] * columns
    for box in boxes:
        first = int(box.start / slice_ + NEAR)
        for column in range(first, min(columns, int(box.end / slice_) + 1)):
            begin, end = column * slice_, (column + 1) * slice_
            share = min(end, box.end) - max(begin, box.start)
            if share > most[column] + NEAR * slice_ and share > slice_ / 4:
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
