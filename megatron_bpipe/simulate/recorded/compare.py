"""Two recorded runs of one pipeline: memory by stage, time, what was exposed and why, losses.

Units: bytes, micro-batches of a whole stage, seconds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.report.run import RunReport
from megatron_bpipe.simulate.draw.html import frame, page
from megatron_bpipe.simulate.draw.picture import Panel, Picture
from megatron_bpipe.simulate.recorded.exposure import Exposure, exposures
from megatron_bpipe.simulate.recorded.losses import Losses, compare_losses
from megatron_bpipe.simulate.recorded.overlay import overlay
from megatron_bpipe.simulate.recorded.recording import Recording, read_report
from megatron_bpipe.simulate.recorded.text import comparison_text

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Times:
    """Seconds from one iteration's start to the next one's, the first left out: it warms up."""

    seconds: tuple[float, ...]

    @classmethod
    def of(cls, run: RunReport) -> Times:
        """Those of a run."""
        starts = [start for start, _ in run.iterations]
        return cls(tuple(b - a for a, b in itertools.pairwise(starts[1:])))

    @property
    def median(self) -> float:
        """Nan without two iterations after the first."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half lies between these."""
        return _quartiles(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Run A and run B; made by ``compare``."""

    names: tuple[str, str]
    recordings: tuple[Recording, Recording]
    times: tuple[Times, Times]
    losses: Losses

    @property
    def runs(self) -> tuple[RunReport, RunReport]:
        """Both reports."""
        return self.recordings[0].run, self.recordings[1].run

    @property
    def time_ratio(self) -> float:
        """Median iteration of B over that of A; nan where one has none."""
        return self.times[1].median / self.times[0].median

    @property
    def time_ratio_quartiles(self) -> tuple[float, float]:
        """Of the ratios of the iterations taken in turn: how far the ratio can be trusted."""
        pairs = zip(self.times[1].seconds, self.times[0].seconds, strict=False)
        return _quartiles([b / a for b, a in pairs])

    def exposures(self, run: int) -> list[Exposure]:
        """What copies made run 0 (A) or 1 (B) wait for, the longest first."""
        return exposures(self.recordings[run])

    def text(self) -> str:
        """For the terminal."""
        return comparison_text(self)

    def data(self) -> dict[str, Any]:
        """For programs."""
        stages = [
            {"stage": x, "A": one.document(), "B": two.document()}
            for x, (one, two) in enumerate(zip(*(run.stages for run in self.runs), strict=True))
        ]
        exposed = {
            letter: [asdict(one) | {"kind": one.kind.value} for one in self.exposures(n)]
            for n, letter in enumerate("AB")
        }
        return {
            "names": self.names,
            "identical": self.losses.identical,
            "losses": self.losses.said,
            "seconds": [times.median for times in self.times],
            "ratio": self.time_ratio,
            "ratio_quartiles": self.time_ratio_quartiles,
            "exposed": exposed,
            "stages": stages,
        }

    def panels(self) -> tuple[Panel, Panel]:
        """Both timelines, each with its prediction behind it."""
        a, b = (overlay(r, n) for r, n in zip(self.recordings, self.names, strict=True))
        return a, b

    def html(self) -> str:
        """A page that works offline."""
        picture = Picture(self.panels(), "bytes", "s")
        return page(picture, " and ".join(self.names), both=True, notes=self.text())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return frame(self.html(), 900)


def compare(before: Path, after: Path) -> Comparison:
    """Read two folders that ``--bpipe-report`` wrote.

    Raises:
        ReportError: one of them is no report, or they are not of one pipeline (p, m and v).
    """
    a, b = read_report(before), read_report(after)
    for what, name in (("p", "stages"), ("v", "chunks a stage"), ("m", "micro-batches")):
        mine, other = getattr(a.run, what), getattr(b.run, what)
        if mine != other:
            raise ReportError(
                f"{before} has {mine} {name}, {after} has {other}: compare two runs of one pipeline"
            )
    names = _names(before, after)
    losses = compare_losses(a.run.losses, b.run.losses)
    return Comparison(names, (a, b), (Times.of(a.run), Times.of(b.run)), losses)


def _names(before: Path, after: Path) -> tuple[str, str]:
    """The last part of each path in which the two differ: x/stock/report is stock."""
    parts = (before.resolve().parts, after.resolve().parts)
    for a, b in zip(*map(reversed, parts), strict=False):
        if a != b:
            return a, b
    return str(before), str(after)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
