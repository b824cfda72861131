"""The figures of docs/planning/reproduction.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_bpipe.estimate.models import TABLE_2
from megatron_bpipe.estimate.paper.pareto import Point, frontier, points
from megatron_bpipe.estimate.paper.tables import published_constants
from megatron_bpipe.schedule.bases.catalogue import build
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.simulate import even_costs, simulate
from megatron_bpipe.simulate.draw.figure import write_figure
from megatron_bpipe.simulate.draw.picture import Picture, panel_of


def draw_schedules(path: Path) -> None:
    """1F1B beside BPipe."""
    panels = []
    for name, title in (("1f1b", "1F1B"), ("bpipe", "BPipe")):
        lowered = lower(build(name, 8, 16))
        costs_here = even_costs(8, forward=1, backward=2, transfer=0.5)
        panels.append(panel_of(simulate(lowered, costs_here), title=title))
    write_figure(Picture(tuple(panels), "micro-batches", ""), path)


MARKS = "osDhv^PX"
COLORS = ("#3f7fbf", "#c2307f", "#6aa56a", "#1d6b4f", "#e39a3b", "#7a6bb5", "#8a5a44", "#66717f")


def draw_pareto(path: Path) -> None:
    """MFU against memory, one panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, model in zip(axes, TABLE_2, strict=True):
        _pareto_panel(axis, model, points(model, published_constants()))
    axes[0].set_ylabel("MFU [%]")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _pareto_panel(axis: Any, model: str, found: Sequence[Point]) -> None:
    best = frontier(found)
    axis.plot(
        [p.peak_gib for p in best],
        [p.mfu_with_penalty for p in best],
        color="#bbb",
        lw=5,
        alpha=0.6,
        zorder=1,
        label="best that fits",
    )
    for method, mark, color in zip(
        dict.fromkeys(p.method for p in found), MARKS, COLORS, strict=True
    ):
        mine = [p for p in found if p.method == method]
        axis.plot(
            [p.peak_gib for p in mine],
            [p.mfu_with_penalty for p in mine],
            color=color,
            lw=1,
            alpha=0.5,
        )
        axis.scatter(
            [p.peak_gib for p in mine],
            [p.mfu_with_penalty for p in mine],
            marker=mark,
            s=52,
            color=color,
            label=method,
            zorder=3,
        )
        for p in mine:
            axis.annotate(
                f"b={p.micro_batch}",
                (p.peak_gib, p.mfu_with_penalty),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=color,
            )
            if p.mfu != p.mfu_with_penalty:
                axis.scatter(
                    [p.peak_gib], [p.mfu], marker=mark, s=44, facecolors="none", edgecolors=color
                )
    axis.axvspan(80, 110, color="#c0392b", alpha=0.07, lw=0)
    axis.text(80.6, 33.2, "over 80 GiB", fontsize=8, color="#c0392b")
    axis.set_xlim(36, 110)
    axis.set_ylim(32, 60)
    axis.set_title(model, loc="left", fontweight="bold")
    axis.set_xlabel("memory of the fullest GPU [GiB]")
    axis.grid(color="#eee")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
