"""A picture as PNG, SVG or PDF for papers, with matplotlib: panels side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bpipe.simulate.draw.picture import Curve, Panel, Picture, memory_text

COLORS = {
    "F": ("#3f7fbf", "#7fb0dd"),
    "B": ("#e39a3b", "#f2c283"),
    "W": ("#6aa56a", "#a3cda3"),
    "E": "#c2307f",
    "L": "#0f8f7a",
    "resident": "#8fb8de",
    "in flight": "#dd84b4",
    "pool": "#f3d48b",
    "weights": "#93a0ad",
    "gradients": "#bac4cd",
    "optimizer": "#dde2e7",
}
FEW_MOVES = 12
"""Arrows of so many moves are drawn in full, those of more are fainter the more there are."""
SUFFIXES = (".png", ".svg", ".pdf")


class FigureError(ValueError):
    """A figure that cannot be made; says what to do."""


def write_figure(picture: Picture, path: Path) -> None:
    """Draw to ``path``; raises FigureError for other endings or without matplotlib."""
    count = len(picture.panels)
    stages = max(panel.stages for panel in picture.panels)
    lane = 0.34 if stages <= 8 else 0.2 if stages <= 32 else 0.12
    figure = new_figure(path, (7.2 * count, 2 * lane * stages + 1.5))
    axes = figure.subplots(2, count, squeeze=False, sharex=True, sharey="row")
    for number, panel in enumerate(picture.panels):
        _timeline(axes[0][number], panel)
        _memory(axes[1][number], panel, picture)
        axes[0][number].set_xlim(0, picture.end)
        axes[1][number].set_xlabel("time" + (" [s]" if picture.time_unit == "s" else ""))
    _legend(figure, picture)
    save_figure(figure, path)


def new_figure(path: Path, inches: tuple[float, float]) -> Any:
    """An empty figure for ``path``; raises FigureError for other endings or without matplotlib."""
    if path.suffix not in SUFFIXES:
        raise FigureError(f"{path}: draws {', '.join(SUFFIXES)}; choose one of these endings")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FigureError("figures need matplotlib: pip install matplotlib") from error
    figure: Any = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write it; the same picture gives the same bytes."""
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(path, dpi=160, metadata=metadata)


def _timeline(axis: Any, panel: Panel) -> None:
    facts = ",  ".join(f"{name} {value}" for name, value in panel.facts)
    axis.set_title(f"{panel.title}\n", fontsize=11, fontweight="bold", loc="left")
    axis.text(0, 1.02, facts, transform=axis.transAxes, fontsize=8.5, color="#555")
    height = 0.5 if panel.ghost else 0.78
    _boxes(axis, panel, -0.39, height, 1.0)
    if panel.ghost:
        _boxes(axis, panel.ghost, 0.16, 0.24, 0.5)
    strength = min(0.65, max(0.12, 0.65 * FEW_MOVES / max(1, len(panel.moves))))
    for move in panel.moves:
        here = move.source if move.kind == "E" else move.target
        other = move.target if move.kind == "E" else move.source
        assert here is not None, "one end of a copy is the stage whose activation it is"
        color = COLORS[move.kind]
        axis.plot((move.start, move.end), (here + 0.43,) * 2, color=color, lw=2, zorder=4)
        if other is not None:
            near, far = here + 0.43, other + (-0.42 if other > here else 0.42)
            ends = ((move.start, near), (move.end, far))
            if move.kind == "L":
                ends = ((move.start, far), (move.end, near))
            style = {"arrowstyle": "-|>", "color": color, "lw": 1.0, "alpha": strength}
            axis.annotate("", ends[1], ends[0], arrowprops=style, zorder=5)
    _stage_axis(axis, panel.stages)


def _boxes(axis: Any, panel: Panel, offset: float, height: float, alpha: float) -> None:
    spans: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for box in panel.boxes:
        key = box.stage, box.kind, int(box.chunk > 0 or box.up)
        spans.setdefault(key, []).append((box.start, box.end - box.start))
    for (stage, kind, shade), parts in spans.items():
        axis.broken_barh(
            parts,
            (stage + offset, height),
            facecolors=COLORS[kind][shade],
            edgecolor="white",
            linewidth=0.3,
            alpha=alpha,
        )
    if alpha == 1 and len(panel.boxes) <= 400:
        for box in panel.boxes:
            if box.end - box.start > 0.012 * panel.end:
                middle = (box.start + box.end) / 2
                axis.text(
                    middle,
                    box.stage + offset + height / 2,
                    str(box.microbatch),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if box.kind == "F" and not box.chunk and not box.up else "#222",
                )


def _memory(axis: Any, panel: Panel, picture: Picture) -> None:
    scale = 0.86 / (picture.most_memory or 1)
    for curve in panel.curves:
        bottom = curve.stage + 0.45
        times = [time for time, _, _ in curve.steps] + [panel.end]
        ground = 0.0
        for name, value in curve.constant:
            top = ground + value
            axis.fill_between(
                (0, panel.end),
                (bottom - scale * ground,) * 2,
                (bottom - scale * top,) * 2,
                color=COLORS[name],
                lw=0,
            )
            ground = top
        levels = [a for _, a, _ in curve.steps] + [curve.steps[-1][1]]
        tops = [a + b for _, a, b in curve.steps] + [sum(curve.steps[-1][1:])]
        low = [bottom - scale * (ground + a) for a in levels]
        high = [bottom - scale * (ground + a) for a in tops]
        base = bottom - scale * ground
        axis.fill_between(times, base, low, step="post", color=COLORS["resident"], lw=0)
        axis.fill_between(times, low, high, step="post", color=COLORS["in flight"], lw=0)
        axis.text(
            picture.end * 1.01,
            curve.stage,
            memory_text(curve.peak, picture.memory_unit)
            .replace("micro-batches", "mb")
            .replace("micro-batch", "mb"),
            fontsize=7,
            va="center",
        )
        if curve.budget is not None:
            axis.plot(
                (0, panel.end), (bottom - scale * curve.budget,) * 2, "--", color="#c0392b", lw=0.7
            )
        if panel.ghost:
            _outline(axis, panel.ghost.curves[curve.stage], panel.ghost.end, scale)
    _stage_axis(axis, panel.stages)


def _outline(axis: Any, curve: Curve, end: float, scale: float) -> None:
    ground = sum(value for _, value in curve.constant)
    times = [time for time, _, _ in curve.steps] + [end]
    tops = [ground + a + b for _, a, b in curve.steps]
    heights = [curve.stage + 0.45 - scale * top for top in [*tops, tops[-1]]]
    axis.step(times, heights, where="post", color="#1d2733", lw=0.7, linestyle=(0, (3, 2)))


def _stage_axis(axis: Any, stages: int) -> None:
    every = 1 if stages <= 16 else 8
    axis.set_ylim(stages - 0.5, -0.5)
    axis.set_yticks(range(0, stages, every), [f"stage {x}" for x in range(0, stages, every)])
    axis.tick_params(length=0, labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#ccc")


def _legend(figure: Any, picture: Picture) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {"F": "forward", "B": "backward", "W": "weight gradients"}
    shades = {(b.kind, int(b.chunk > 0 or b.up)) for p in picture.panels for b in p.boxes}
    handles: list[Any] = [
        Patch(
            color=COLORS[kind][shade], label=names[kind] + (", second chunk or direction") * shade
        )
        for kind, shade in sorted(shades, key=lambda s: (s[1], "FBW".index(s[0])))
    ]
    if any(panel.moves for panel in picture.panels):
        handles += [
            Line2D([], [], color=COLORS["E"], label="evict"),
            Line2D([], [], color=COLORS["L"], label="load"),
        ]
    handles.append(Patch(color=COLORS["resident"], label="activations"))
    if any(panel.moves for panel in picture.panels):
        handles.append(Patch(color=COLORS["in flight"], label="in flight"))
    constants = {name for p in picture.panels for c in p.curves for name, _ in c.constant}
    for name in ("weights", "gradients", "optimizer", "pool"):
        if name in constants:
            label = "pool lent" if name == "pool" else name
            handles.append(Patch(color=COLORS[name], label=label))
    if any(c.budget is not None for panel in picture.panels for c in panel.curves):
        handles.append(Line2D([], [], color="#c0392b", ls="--", lw=0.9, label="budget"))
    if any(panel.ghost for panel in picture.panels):
        handles.append(
            Line2D([], [], color="#1d2733", ls="--", lw=0.9, label="pale, dashed: predicted")
        )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(8, len(handles)),
        fontsize=8,
        frameon=False,
    )
