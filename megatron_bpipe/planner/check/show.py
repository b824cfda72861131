"""The comparison with published runs as text and as data.  Units: seconds, GiB, per cent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from megatron_bpipe.placement.columns import columns
from megatron_bpipe.planner.check.compare import Compared, Error, compare, error


def check_text(*, as_json: bool) -> str:
    """All published runs, predicted now."""
    compared = compare()
    return json.dumps(data(compared), indent=2) if as_json else table(compared)


def table(compared: Sequence[Compared]) -> str:
    """Run by run, then how far off each source and all of them are."""
    head = ("source", "GPU", "run", "s", "predicted", "off %", "GiB", "predicted", "off %")
    rows: list[tuple[str, ...]] = [head]
    for found in compared:
        run = found.published
        seconds = _three(run.seconds, found.seconds, found.seconds_off, 3)
        gib = _three(run.gib, found.gib, found.gib_off, 2)
        rows.append((run.source, run.gpu, run.name, *seconds, *gib))
    sources = [(name, name) for name in dict.fromkeys(c.published.source for c in compared)]
    gpus = [(name, name) for name in dict.fromkeys(c.published.gpu for c in compared)]
    totals: list[tuple[str, ...]] = [("off, in per cent", "seconds", "memory")]
    for title, name in [*sources, *gpus, ("all", "")]:
        mine = [c for c in compared if name in ("", c.published.source, c.published.gpu)]
        seconds_off = error(c.seconds_off for c in mine)
        gib_off = error(c.gib_off for c in mine)
        totals.append((title, error_text(seconds_off), error_text(gib_off)))
    return columns(rows) + "\n\n" + columns(totals)


def error_text(found: Error) -> str:
    """Mean, worst, of how many runs."""
    if not found.runs:
        return "-"
    return f"{100 * found.mean:.1f} mean, {100 * found.worst:.1f} worst, {found.runs} runs"


def data(compared: Sequence[Compared]) -> dict[str, object]:
    """The same for JSON; shares, not per cent."""
    return {
        "runs": [
            {
                "source": c.published.source,
                "gpu": c.published.gpu,
                "name": c.published.name,
                "layout": asdict(c.published.run.layout),
                "micro_batch": c.published.run.micro_batch,
                "global_batch": c.published.run.global_batch,
                "attention": c.published.run.attention,
                "chunks": c.published.run.chunks,
                "measured_seconds": c.published.seconds,
                "seconds": c.seconds,
                "seconds_off": c.seconds_off,
                "measured_gib": c.published.gib,
                "allocated_gib": c.gib,
                "gib_off": c.gib_off,
            }
            for c in compared
        ],
        "seconds_off": asdict(error(c.seconds_off for c in compared)),
        "gib_off": asdict(error(c.gib_off for c in compared)),
    }


def _three(
    measured: float | None, predicted: float, off: float | None, digits: int
) -> tuple[str, str, str]:
    if measured is None or off is None:
        return "-", f"{predicted:.{digits}f}", "-"
    return f"{measured:.{digits}f}", f"{predicted:.{digits}f}", f"{100 * off:+.1f}"
