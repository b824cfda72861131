"""The end of a run for people: one line a stage; and writing a file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from megatron_bpipe.report.run import RunReport, StageReport

MIB = 2**20
HEAD = (
    "stage  micro-batches  peak MiB  pool MiB  host MiB  evicted MiB"
    " | one forward: can leave  stays  not captured"
)


def table(report: RunReport) -> str:
    """The report for people, in MiB.

    Micro-batches are ``4 -> 3``: what the stock schedule holds, then what was measured, a pool
    that is lent included; one number where the two agree.
    """
    lines = [HEAD]
    for stage in report.stages:
        forward = stage.forward or {}
        kept = sum((forward.get("kept_bytes") or {}).values())
        missed = forward.get("not_captured_bytes")
        lines.append(
            f"{stage.stage:5d} {micro_batches(stage):>14}"
            f" {stage.peak_activation_bytes / MIB:9.2f} {stage.pool_bytes / MIB:9.2f}"
            f" {stage.hosted_bytes / MIB:9.2f} {stage.evicted_bytes / MIB:12.2f}"
            f" | {forward.get('evictable_bytes', 0) / MIB:22.2f} {kept / MIB:6.2f}"
            f" {'unknown' if missed is None else format(missed / MIB, '.2f'):>13}"
        )
    return "\n".join(lines)


def micro_batches(stage: StageReport) -> str:
    """``4 -> 3``."""
    now, stock = stage.peak_microbatches, stage.stock_microbatches
    if stock is None or stock == now:
        return f"{now:g}"
    return f"{stock:g} -> {now:g}"


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
