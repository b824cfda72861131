"""Memory of two recorded runs over one iteration as a figure, one panel a stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bpipe.simulate.draw.figure import new_figure, save_figure

if TYPE_CHECKING:
    from megatron_bpipe.simulate.recorded.compare import Comparison

MIB = 2**20
COLOURS = ("#b0413e", "#2a6f97")


def write_memory_figure(found: Comparison, path: Path) -> None:
    """Draw to ``path``; raises FigureError for other endings or without matplotlib."""
    p = found.runs[0].p
    columns = min(4, p)
    rows = -(-p // columns)
    figure = new_figure(path, (3.6 * columns, 2.5 * rows + 1.1))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for stage, axis in enumerate(axes.flat):
        if stage >= p:
            axis.set_axis_off()
            continue
        for panel, name, colour in zip(found.panels(), found.names, COLOURS, strict=True):
            curve = panel.curves[stage]
            pool = sum(value for _, value in curve.constant)
            times = [time for time, _, _ in curve.steps]
            levels = [(pool + a + b) / MIB for _, a, b in curve.steps]
            axis.step(times, levels, where="post", color=colour, label=name, linewidth=1.4)
            if pool:
                axis.axhspan(0, pool / MIB, color=colour, alpha=0.12, lw=0, label="pool it lends")
            if curve.budget is not None:
                axis.axhline(curve.budget / MIB, color="#c0392b", ls="--", lw=0.9, label="budget")
        axis.set_title(f"stage {stage}", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        if stage % columns == 0:
            axis.set_ylabel("activations, MiB")
        if stage >= p - columns:
            axis.set_xlabel("seconds")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )
    figure.supxlabel(_words(found), fontsize=9, color="#555")
    save_figure(figure, path)


def _words(found: Comparison) -> str:
    """What the picture cannot show: that the two ends differ by chance, or do not."""
    a, b = found.times
    if not a.seconds or not b.seconds:
        return "one iteration of each run"
    low, high = found.time_ratio_quartiles
    chance = ": no difference that these two runs can show" if low <= 1 <= high else ""
    chance += "; separate runs, so what else the machine did differs too"
    return (
        f"one iteration of each run, the median one of those recorded; over all iterations "
        f"{found.names[0]} {a.median:.3g} s, {found.names[1]} {b.median:.3g} s,\n"
        f"ratio {found.time_ratio:.3f} (quartiles {low:.3f} to {high:.3f}){chance}"
    )
