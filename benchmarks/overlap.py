"""How much of the copies in a profiler's trace ran beside kernels. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Span = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Microseconds: copies, kernels, and copies while at least one kernel ran."""

    copies: float
    kernels: float
    beside: float


def overlap_of(events: Iterable[Mapping[str, Any]]) -> Overlap:
    """Read events as torch.profiler's ``traceEvents`` has them (``cat``, ``ts``, ``dur``)."""
    copies: list[Span] = []
    kernels: list[Span] = []
    for event in events:
        target = {"gpu_memcpy": copies, "kernel": kernels}.get(event.get("cat", ""))
        if target is not None:
            target.append((event["ts"], event["ts"] + event["dur"]))
    copied, computed = _merged(copies), _merged(kernels)
    return Overlap(_length(copied), _length(computed), _length(_common(copied, computed)))


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _common(a: list[Span], b: list[Span]) -> list[Span]:
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)
