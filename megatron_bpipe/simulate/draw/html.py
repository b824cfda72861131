"""A picture as one self-contained page that works offline: data, style and script in one file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from megatron_bpipe.simulate.draw.picture import Panel, Picture, panel_of
from megatron_bpipe.simulate.result import Simulation


def page(picture: Picture, heading: str, *, both: bool = False, notes: str = "") -> str:
    """The page's text.

    ``both`` draws the memory of two panels over one axis besides; ``notes`` is text above them.
    """
    data = {
        "unit": picture.time_unit,
        "memory": picture.memory_unit,
        "end": picture.end,
        "most": picture.most_memory or 1.0,
        "both": both,
        "panels": [_panel(panel) for panel in picture.panels],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    here = Path(__file__).parent
    names = ("page_parts.js", "page_both.js", "page.js")
    script = "".join((here / name).read_text(encoding="utf-8") for name in names)
    skeleton = (here / "page.html").read_text(encoding="utf-8")
    filled = skeleton.replace("@SCRIPT@", script).replace("@HEADING@", html.escape(heading))
    filled = filled.replace("@NOTES@", f"<pre>{html.escape(notes)}</pre>" if notes else "")
    return filled.replace("@DATA@", text)


def frame(text: str, height: int) -> str:
    """A page inside another one, as notebooks show it."""
    quoted = html.escape(text, quote=True)
    return f'<iframe srcdoc="{quoted}" width="100%" height="{height}" frameborder="0"></iframe>'


def notebook_page(simulation: Simulation) -> str:
    """A simulation as notebooks show it."""
    panel = panel_of(simulation)
    return frame(page(Picture((panel,), "micro-batches", ""), panel.title), 260 + 60 * panel.stages)


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "facts": panel.facts,
        "stages": panel.stages,
        "end": panel.end,
        "boxes": [
            [
                b.stage,
                b.op,
                b.kind,
                b.microbatch,
                b.chunk,
                int(b.up),
                _short(b.start),
                _short(b.end),
            ]
            for b in panel.boxes
        ],
        "moves": [
            [m.op, m.kind, m.source, m.target, _short(m.start), _short(m.end), m.size]
            for m in panel.moves
        ],
        "curves": [
            {
                "constant": [[name, value] for name, value in curve.constant],
                "steps": [[_short(t), a, b] for t, a, b in curve.steps],
                "budget": curve.budget,
            }
            for curve in panel.curves
        ],
        "ghost": None if panel.ghost is None else _panel(panel.ghost),
    }


def _short(time: float) -> float:
    return float(f"{time:.9g}")
