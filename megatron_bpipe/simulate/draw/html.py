"""A picture as one self-contained page that works offline: data, style and script in one file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from megatron_bpipe.simulate.draw.picture import Panel, Picture


def page(picture: Picture, heading: str) -> str:
    """The page's text."""
    data = {
        "unit": picture.time_unit,
        "memory": picture.memory_unit,
        "end": picture.end,
        "most": picture.most_memory,
        "panels": [_panel(panel) for panel in picture.panels],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    here = Path(__file__).parent
    script = (here / "page.js").read_text(encoding="utf-8")
    skeleton = (here / "page.html").read_text(encoding="utf-8")
    filled = skeleton.replace("@SCRIPT@", script).replace("@HEADING@", html.escape(heading))
    return filled.replace("@DATA@", text)


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "facts": panel.facts,
        "stages": panel.stages,
        "end": panel.end,
        "budget": panel.budget,
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
            }
            for curve in panel.curves
        ],
        "ghost": None if panel.ghost is None else _panel(panel.ghost),
    }


def _short(time: float) -> float:
    return float(f"{time:.9g}")
