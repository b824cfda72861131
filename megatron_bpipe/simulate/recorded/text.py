"""A comparison of two runs for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_bpipe.report.run import RunReport
from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.simulate.draw.picture import memory_text, time_text

if TYPE_CHECKING:
    from megatron_bpipe.simulate.recorded.compare import Comparison

MIB = 2**20
WORTH = 0.001
"""Share of an iteration below which an exposed copy is not worth a line."""


def comparison_text(found: Comparison) -> str:
    """Table by stage, then time, what was exposed, and losses."""
    a, b = found.runs
    return "\n".join(
        [
            *(
                _run(letter, name, run)
                for letter, name, run in zip("AB", found.names, (a, b), strict=True)
            ),
            *_differences(a, b),
            "",
            *_stages(a, b),
            "",
            _time(found),
            *_exposed(found),
            f"losses identical: {found.losses.said}",
        ]
    )


def _run(letter: str, name: str, run: RunReport) -> str:
    what = "stock, observed"
    if run.bpipe:
        budget = "" if run.budget is None else f", budget {run.budget:g}"
        what = f"BPipe{budget}" + (f", {run.transport}" if run.transport else "")
    chunks = f", {run.v} chunks a stage" if run.v > 1 else ""
    when = f", {run.written}" if run.written else ""
    return f"{letter} {name}: {what}; {run.p} stages, {run.m} micro-batches{chunks}{when}"


def _differences(a: RunReport, b: RunReport) -> list[str]:
    """Packages and flags in which the runs differ, the report's folder apart."""
    out = []
    for name in sorted({*a.packages, *b.packages}):
        one, two = (run.packages.get(name, "none") for run in (a, b))
        if one != two:
            out.append(f"{name}: A {one}, B {two}")
    mine, other = _flags(a), _flags(b)
    for letter, here, there in (("A", mine, other), ("B", other, mine)):
        only = [flag for flag in here if flag not in there]
        if only:
            out.append(f"flags of {letter} only: {' '.join(only)}")
    return out


def _flags(run: RunReport) -> list[str]:
    """Each flag with its values as one text."""
    out: list[str] = []
    for word in run.flags:
        if word.startswith("--") or not out:
            out.append(word)
        else:
            out[-1] += f" {word}"
    return [flag for flag in out if not flag.startswith("--bpipe-report")]


def _stages(a: RunReport, b: RunReport) -> list[str]:
    lines = [
        "stage  micro-batches  peak MiB: A         B       difference   lent MiB  evicted MiB",
    ]
    for x, (mine, other) in enumerate(zip(a.stages, b.stages, strict=True)):
        before, after = mine.peak_activation_bytes, other.peak_activation_bytes
        held = f"{mine.peak_microbatches:g} -> {other.peak_microbatches:g}"
        lines.append(
            f"{x:5d} {held:>14} {before / MIB:12.1f} {after / MIB:9.1f}"
            f" {_change(before, after):>16}"
            f" {other.pool_bytes / MIB:10.1f} {other.evicted_bytes / MIB:12.1f}"
        )
    most, least = (max(s.peak_activation_bytes for s in run.stages) for run in (a, b))
    fullest = f"{most / MIB:12.1f} {least / MIB:9.1f} {_change(most, least):>16}"
    lines.append("fullest stage".ljust(20) + " " + fullest)
    lines.append("A stage's figures include the pool it lends; evicted: the whole run of B.")
    return lines


def _change(before: float, after: float) -> str:
    share = f" ({100 * (after / before - 1):+.0f} %)" if before else ""
    return f"{(after - before) / MIB:+.1f}{share}"


def _time(found: Comparison) -> str:
    if not all(times.seconds for times in found.times):
        return "time per iteration: a run of at least 3 iterations has one (the first warms up)"
    said = []
    for letter, times in zip("AB", found.times, strict=True):
        low, high = times.quartiles
        count = f"{len(times.seconds)} iteration" + "s" * (len(times.seconds) != 1)
        said.append(f"{letter} {times.median:.4g} s ({low:.4g} to {high:.4g}, {count})")
    low, high = found.time_ratio_quartiles
    line = (
        f"time per iteration: {', '.join(said)}; ratio {found.time_ratio:.3f} "
        f"({low:.3f} to {high:.3f})"
    )
    if low <= 1 <= high:
        line += ": no difference that these two runs can show"
    return line + "\n  medians and quartiles; separate runs, so machine and hour differ too"


def _exposed(found: Comparison) -> list[str]:
    lines = []
    for letter, n in (("A", 0), ("B", 1)):
        run = found.runs[n]
        if not any(stage.evicted_bytes for stage in run.stages):
            continue
        total = max((stage.exposed_seconds or 0.0) for stage in run.stages)
        seconds = found.times[n].median
        share = "" if math.isnan(seconds) else f" ({100 * total / seconds:.1f} %)"
        lines.append(
            f"exposed in {letter}: at most {time_text(total, 's')} an iteration on one "
            f"stage{share}, mean of the last iterations; in the one that is drawn:"
        )
        seen = [
            one for one in found.exposures(n) if one.exposed > WORTH * found.recordings[n].seconds
        ]
        if not seen:
            lines[-1] += " nothing to speak of"
        for one in seen:
            what = "evictions" if one.kind is Kind.EVICT else "loads"
            lines.append(
                f"  stage {one.stage}: {time_text(one.exposed, 's')} for {one.count} {what} of "
                f"{memory_text(one.size, 'bytes')}, {time_text(one.copy, 's')} each beside "
                f"{time_text(one.beside, 's')} of computing: {one.why}"
            )
    return lines
