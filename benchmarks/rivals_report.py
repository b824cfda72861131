"""What `benchmarks/rivals.py` found, predicted and shown: pure but for the figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec, make
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.simulate import simulate
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.draw.figure import new_figure, save_figure
from megatron_bpipe.simulate.memory import StageBytes, memory_peaks
from megatron_bpipe.simulate.recorded.recording import Recording, measured_bytes, measured_costs

MIB = 2**20


@dataclass(frozen=True)
class Rival:
    """One way to train the same model.

    Attributes:
        name: for people.
        flags: Megatron's and ours, beside the model's.
        schedule: its name in the catalogue.
        balanced: with ``--bpipe``.
        recomputed: share of a forward that every backward computes again.
        to_host: evicted activations go to the stage's own host memory.
        published: most micro-batches on a stage by its paper, in words.
    """

    name: str
    flags: tuple[str, ...]
    schedule: str = "1f1b"
    balanced: bool = False
    recomputed: float = 0.0
    to_host: bool = False
    published: str = ""

    @property
    def chunks(self) -> int:
        """Model chunks a stage."""
        return CATALOGUE[self.schedule].chunks or 2

    @property
    def splits(self) -> bool:
        """Whether W is apart from B."""
        return CATALOGUE[self.schedule].splits_backward


@dataclass(frozen=True)
class Row:
    """Seconds of every measured iteration; bytes and micro-batches of the fullest stage."""

    rival: Rival
    seconds: tuple[float, ...]
    peak: int
    microbatches: float
    allocator: int | None
    predicted_seconds: float
    predicted_peak: int

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def predict(
    rival: Rival, pace: float, stock: Recording, own: Recording, rest: float, left: int
) -> tuple[float, int]:
    """Seconds and bytes of the fullest stage by the simulator.

    From what the stock 1F1B run recorded: bytes of one micro-batch on each stage and, unless ops
    are paced, mean seconds of its forward and backward. A chunk is an equal part, B and W are half
    a backward each, copies are hidden. A message takes what makes the forecast of the stock run its
    own time (`seconds_of_message`). What a recomputing run keeps is taken from its own recording.

    Args:
        rival: what is predicted.
        pace: seconds of a stage's forward, half those of its backward; 0: as recorded.
        stock: recording of stock 1F1B.
        own: of this rival, for recomputation.
        rest: seconds of an iteration outside the schedule.
        left: bytes that one micro-batch keeps between B and W on an inner stage.
    """
    spec = ScheduleSpec(rival.schedule, stock.run.p, stock.run.m, rival.chunks)
    logical = make(replace(spec, balanced=rival.balanced))
    schedule = lower(replace(logical, to_host=rival.to_host))
    recorded = measured_costs(stock)
    if pace:
        even = StageCosts((pace,), (2 * pace,))
        recorded = Costs((even,) * stock.run.p)
    recorded = replace(recorded, send=seconds_of_message(recorded, stock.run.m, stock.seconds))
    simulation = simulate(schedule, _costs(rival, recorded))
    sizes = measured_bytes(own if rival.recomputed else stock)
    peak = max(memory_peaks(simulation, _sizes(rival, sizes, left)))
    return simulation.seconds + rest, peak


def seconds_of_message(whole: Costs, m: int, seconds: float) -> float:
    """What a message between two stages takes if 1F1B's iteration takes so long.

    It stands for all that a process spends on one beside waiting for the other's computation.

    Args:
        whole: of a stage's ops; its own seconds of a message are not looked at.
        m: micro-batches.
        seconds: of stock 1F1B's iteration, without the optimizer.
    """
    schedule = lower(make(ScheduleSpec("1f1b", len(whole.stages), m)))

    def taken(send: float) -> float:
        return simulate(schedule, replace(whole, send=send)).seconds

    low, high = 0.0, seconds
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) < seconds else (low, middle)
    return low


def made_again(rival: Rival, stock: Recording, own: Recording, layers: int) -> int:
    """Bytes that one layer makes anew in a backward: there for a moment, at no op's boundary.

    Args:
        rival: that recomputes, or not.
        stock: recording of stock 1F1B.
        own: of this rival.
        layers: on an inner stage.
    """
    if not rival.recomputed:
        return 0
    kept = [measured_bytes(run)[1].activation[0] for run in (stock, own)]
    return (kept[0] - kept[1]) // layers


def _costs(rival: Rival, whole: Costs) -> Costs:
    v, stages = rival.chunks, []
    for stage in whole.stages:
        forward, backward = stage.forward[0] / v, stage.backward[0] / v
        both = backward / 2
        stages.append(
            StageCosts(
                forward=(forward,),
                backward=(both if rival.splits else backward,),
                weight=(both if rival.splits else 0.0,),
                recompute=rival.recomputed * forward,
            )
        )
    return Costs(tuple(stages), send=whole.send)


def _sizes(rival: Rival, whole: Sequence[StageBytes], left: int) -> tuple[StageBytes, ...]:
    """Chunks of equal layers; the embedding's and the head's part where the placement has them."""
    v = rival.chunks
    bytes_of = [size.activation[0] for size in whole]
    if v == 1:
        kept = [left / size if rival.splits else 1.0 for size in bytes_of]
        pairs = zip(bytes_of, kept, strict=True)
        return tuple(StageBytes((size,), kept_for_weight=share) for size, share in pairs)
    inner = bytes_of[1]
    chunks = [[inner // v] * v for _ in whole]
    chunks[0][0] += bytes_of[0] - inner
    last = 0 if CATALOGUE[rival.schedule].v_placed else len(whole) - 1
    chunks[last][-1] += bytes_of[-1] - inner
    share = left / inner if rival.splits else 1.0
    return tuple(StageBytes(tuple(sizes), kept_for_weight=share) for sizes in chunks)


def table(rows: Sequence[Row]) -> str:
    """As Markdown: measured, beside it what was predicted."""
    first = rows[0]
    lines = [
        "| | seconds (quartiles) | of stock | predicted | fullest stage, MiB | of stock "
        "| predicted | micro-batches | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.quartiles
        foreseen = f"{row.predicted_peak / MIB:.2f}"
        lines.append(
            f"| {row.rival.name} | {row.median:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row.median / first.median:.2f} | {row.predicted_seconds:.3f} "
            f"| {row.peak / MIB:.2f} | {row.peak / first.peak:.2f} | {foreseen} "
            f"| {row.microbatches:g} | {row.rival.published} |"
        )
    return "\n".join(lines)


def best(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats in both, fastest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.median, row.peak)):
        if not found or row.peak < found[-1].peak:
            found.append(row)
    return found


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Seconds against the fullest stage's peak: measured filled, predicted hollow."""
    figure = new_figure(path, (9.0, 6.0))
    axis = figure.subplots()
    frontier = best(rows)
    axis.step(
        [row.median for row in frontier],
        [row.peak / MIB for row in frontier],
        where="post",
        color="#999999",
        linewidth=1.0,
        zorder=1,
        label="best of all measured",
    )
    for number, row in enumerate(rows):
        colour = f"C{number % 10}"
        low, high = row.quartiles
        x, y = row.median, row.peak / MIB
        axis.errorbar(
            [x],
            [y],
            xerr=[[x - low], [high - x]],
            fmt="o" if number < 10 else "s",
            color=colour,
            capsize=2,
            zorder=3,
        )
        there = row.predicted_seconds, row.predicted_peak / MIB
        axis.plot([x, there[0]], [y, there[1]], color=colour, linewidth=0.7, alpha=0.6)
        axis.plot(*there, marker="o", mfc="none", color=colour, zorder=2)
    _label(axis, rows)
    axis.margins(x=0.18)
    axis.set_xlabel("seconds an iteration (median, quartiles); hollow: predicted")
    axis.set_ylabel("activations of the fullest stage, MiB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.set_title(title, fontsize=10)
    axis.legend(loc="upper right", fontsize=8)
    save_figure(figure, path)


def _label(axis: Any, rows: Sequence[Row]) -> None:
    """Names beside the points; one that would cover the name below it moves up."""
    wide = max(row.median for row in rows) - min(row.median for row in rows)
    high = max(row.peak for row in rows)
    placed: list[tuple[Row, float]] = []
    for row in sorted(rows, key=lambda row: row.peak):
        up = -3.0
        for other, height in placed:
            apart = (row.peak - other.peak) / high * 360  # points
            if abs(row.median - other.median) < 0.18 * wide and apart + up < height + 9:
                up = max(up, height + 9 - apart)
        placed.append((row, up))
        axis.annotate(
            row.rival.name,
            (row.median, row.peak / MIB),
            xytext=(8, up),
            textcoords="offset points",
            fontsize=8,
        )
