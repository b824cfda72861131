#!/usr/bin/env python3
"""Measured beside published, from the logs of scripts/reproduction/run_table.py.

    scripts/reproduction/collect.py runs/tables [--gpu A100-80GB | --peak-tflops N] [--json]

Read from the logs, which are Megatron's own:
    elapsed time per iteration (ms)      the median, without the first `WARM_UP` iterations
    [Rank N] ... max allocated           the most any rank of a stage had allocated, in GiB
    OutOfMemoryError                     the row is OOM
MFU is equation 1 over the time of a whole iteration, optimizer included, and the GPUs' peak. A
single stage's time is thus a little longer than the T(b) of table 5, which leaves the
optimizer out.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from table_rows import ONE_GPU, Row, RowError, load_rows

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G, gpu_named
from megatron_bpipe.estimate.time.flops import mfu_percent
from megatron_bpipe.placement.columns import columns

WARM_UP = 3
ITERATION = re.compile(
    r"iteration\s+(\d+)/\s*\d+ \|.*?elapsed time per iteration \(ms\): ([0-9.]+)"
)
MEMORY = re.compile(r"\[Rank (\d+)\] .*?memory \(MB\).*?max allocated: ([0-9.]+)")
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory")


@dataclass(frozen=True)
class Measured:
    """One row's run.

    ``status`` is ``ok``, ``OOM``, ``failed`` (too few iterations, no OOM) or ``not run``;
    ``peak_gib`` has one number a stage, or none where the log has none.
    """

    row: str
    model: str
    micro_batch: int
    bpipe: bool
    attention: str
    one_gpu: bool
    status: str
    published_mfu: float
    mfu: float | None = None
    seconds: float | None = None
    peak_gib: tuple[float | None, ...] = ()


def read_log(row: Row, text: str, peak_flops: float, one_gpu: bool) -> Measured:
    """What one row's log says."""
    times = {int(step): float(ms) / 1e3 for step, ms in ITERATION.findall(text)}
    kept = [seconds for step, seconds in sorted(times.items()) if step > WARM_UP]
    peaks = _peaks(row, MEMORY.findall(text))
    if OUT_OF_MEMORY.search(text):
        return _measured(row, one_gpu, "OOM", peak_gib=peaks)
    if not kept:
        return _measured(row, one_gpu, "failed", peak_gib=peaks)
    seconds = statistics.median(kept)
    mfu = mfu_percent(row.flops(one_gpu), seconds, row.gpus(one_gpu), peak_flops)
    return _measured(row, one_gpu, "ok", mfu=mfu, seconds=seconds, peak_gib=peaks)


def collect(folder: Path, rows: Iterable[Row], peak_flops: float) -> list[Measured]:
    """Every row, and every single-stage row that also ran on one GPU."""
    found = []
    for row in rows:
        for one_gpu in (False, True):
            text = _log(folder / (row.name + (ONE_GPU if one_gpu else "")))
            if text is not None:
                found.append(read_log(row, text, peak_flops, one_gpu))
            elif not one_gpu:
                found.append(_measured(row, one_gpu, "not run"))
    return found


def _log(folder: Path) -> str | None:
    """The newest Slurm job's log, or the logs of all nodes; None where there is none."""
    jobs = sorted(folder.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    files = jobs[-1:] or sorted(folder.glob("node-*.log"))
    if not files:
        return None
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def _peaks(row: Row, lines: list[tuple[str, str]]) -> tuple[float | None, ...]:
    """The most of each stage; Megatron's ranks of one stage follow each other (order tp-...-pp)."""
    stages: list[float | None] = [None] * row.pipeline_parallel
    for rank, megabytes in lines:
        stage = int(rank) // row.tensor_parallel
        if stage < len(stages):
            stages[stage] = max(stages[stage] or 0.0, float(megabytes) / 1024)
    return tuple(stages) if lines else ()


def _measured(
    row: Row,
    one_gpu: bool,
    status: str,
    *,
    mfu: float | None = None,
    seconds: float | None = None,
    peak_gib: tuple[float | None, ...] = (),
) -> Measured:
    return Measured(
        row=row.name,
        model=row.model,
        micro_batch=row.micro_batch,
        bpipe=row.bpipe,
        attention=row.attention,
        one_gpu=one_gpu,
        status=status,
        published_mfu=row.published_mfu,
        mfu=mfu,
        seconds=seconds,
        peak_gib=peak_gib,
    )


def table(measured: Iterable[Measured]) -> str:
    """One line a row."""
    head = ("row", "model", "b", "bpipe", "attention", "published", "measured", "s/iteration")
    lines: list[tuple[str, ...]] = [(*head, "peak GiB by stage")]
    for one in measured:
        lines.append(
            (
                one.row + (" (one GPU)" if one.one_gpu else ""),
                one.model,
                str(one.micro_batch),
                "yes" if one.bpipe else "no",
                one.attention,
                f"{one.published_mfu:.1f}",
                f"{one.mfu:.1f}" if one.mfu is not None else one.status,
                f"{one.seconds:.2f}" if one.seconds is not None else "-",
                " ".join("-" if peak is None else f"{peak:.1f}" for peak in one.peak_gib) or "-",
            )
        )
    return columns(lines)


def main() -> int:
    """Print the table; returns 2 when the folder or the GPU is not known."""
    parser = argparse.ArgumentParser(description="Measured beside published MFU.")
    parser.add_argument("folder", type=Path, help="run_table.py's --out")
    peak = parser.add_mutually_exclusive_group()
    peak.add_argument("--gpu", default=A100_80G.name, help=f"default {A100_80G.name}")
    peak.add_argument("--peak-tflops", type=float, help="dense bf16 peak of another GPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    try:
        if not args.folder.is_dir():
            raise RowError(f"no folder {args.folder}: give run_table.py's --out")
        if args.peak_tflops is not None and args.peak_tflops <= 0:
            raise RowError(f"--peak-tflops {args.peak_tflops:g}: give a positive number")
        flops = 1e12 * args.peak_tflops if args.peak_tflops else gpu_named(args.gpu).flops
        measured = collect(args.folder, load_rows(), flops)
    except (RowError, EstimateError) as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(one) for one in measured], indent=2) if args.json else table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
