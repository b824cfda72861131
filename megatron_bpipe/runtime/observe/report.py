"""``memory.json`` from the summaries of all ranks: the worst rank of each stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIB = 2**20


def merge(summaries: list[dict[str, Any]], *, bpipe: bool, budget: int | None) -> dict[str, Any]:
    """One document for the run.

    An acceptor's ``peak_activation_bytes`` and ``peak_microbatches`` include the pool and its
    slots: that memory is gone for it whether or not something lies in it just then. What is its
    own stands beside it as ``own_*``. ``hosted_bytes`` is host memory that an evictor keeps for its
    own activations; it counts nowhere else.
    """
    stages = []
    for stage in sorted({s["stage"] for s in summaries}):
        ranks = [s for s in summaries if s["stage"] == stage]
        worst = max(ranks, key=lambda s: s["peak_activation_bytes"] + s["pool_bytes"])
        stages.append(
            {
                "stage": stage,
                "rank": worst["rank"],
                "peak_activation_bytes": worst["peak_activation_bytes"] + worst["pool_bytes"],
                "peak_microbatches": worst["peak_microbatches"] + worst["pool_slots"],
                "own_activation_bytes": worst["peak_activation_bytes"],
                "own_microbatches": worst["peak_microbatches"],
                "pool_bytes": worst["pool_bytes"],
                "pool_slots": worst["pool_slots"],
                "hosted_bytes": worst["hosted_bytes"],
                "evicted_bytes": worst["evicted_bytes"],
                "loaded_bytes": worst["loaded_bytes"],
                "allocator_peak_bytes": worst["allocator_peak_bytes"],
                "static_bytes": worst["static_bytes"],
                "device_bytes": worst["device_bytes"],
                "forward": worst["forward"],
            }
        )
    losses: list[list[str]] = next((s["losses"] for s in summaries if s["losses"]), [])
    return {
        "bpipe": bpipe,
        "budget": budget,
        "stages": stages,
        "iterations": summaries[0]["iterations"],
        "losses": losses,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people: one line a stage, in MiB."""
    lines = [
        "stage  peak MiB  micro-batches  pool MiB  host MiB  evicted MiB"
        " | one forward: can leave  stays  not captured",
    ]
    for stage in report["stages"]:
        forward = stage["forward"] or {}
        kept = sum((forward.get("kept_bytes") or {}).values())
        missed = forward.get("not_captured_bytes")
        lines.append(
            f"{stage['stage']:5d} {stage['peak_activation_bytes'] / MIB:9.2f}"
            f" {stage['peak_microbatches']:14d} {stage['pool_bytes'] / MIB:9.2f}"
            f" {stage['hosted_bytes'] / MIB:9.2f} {stage['evicted_bytes'] / MIB:12.2f}"
            f" | {forward.get('evictable_bytes', 0) / MIB:22.2f} {kept / MIB:6.2f}"
            f" {'unknown' if missed is None else format(missed / MIB, '.2f'):>13}"
        )
    return "\n".join(lines)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write ``document`` in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(document), encoding="utf-8")
    part.replace(path)
