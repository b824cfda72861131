"""``memory.json`` from the summaries of all ranks: the worst rank of each stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def merge(summaries: list[dict[str, Any]], *, bpipe: bool, budget: int | None) -> dict[str, Any]:
    """One document for the run.

    An acceptor's ``peak_activation_bytes`` and ``peak_microbatches`` include the pool and its
    slots: that memory is gone for it whether or not something lies in it just then. What is its
    own stands beside it as ``own_*``.
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
                "evicted_bytes": worst["evicted_bytes"],
                "loaded_bytes": worst["loaded_bytes"],
                "allocator_peak_bytes": worst["allocator_peak_bytes"],
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


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write ``document`` in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(document), encoding="utf-8")
    part.replace(path)
