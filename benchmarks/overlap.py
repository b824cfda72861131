"""How much of the copies in a profiler's trace ran beside kernels. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Microseconds: copies, kernels, and copies while at least one kernel ran."""

    copies: float
    kernels: float
    beside: float


def overlap_of(events: Iterable[Mapping[str, Any]], kinds: Sequence[str] = ("",)) -> Overlap:
    """Read events as torch.profiler's ``traceEvents`` has them (``cat``, ``ts``, ``dur``).

    Copies on streams that also run kernels are the computation's own and left out.

    Args:
        events: of one process.
        kinds: words one of which a copy's name must have, such as DtoD.
    """
    events = list(events)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    computing = {_stream(event) for event in kernels}
    copies = [
        event
        for event in events
        if event.get("cat") == "gpu_memcpy"
        and _stream(event) not in computing
        and any(kind in event["name"] for kind in kinds)
    ]
    copied, computed = _merged(map(_span, copies)), _merged(map(_span, kernels))
    return Overlap(_length(copied), _length(computed), _length(_common(copied, computed)))


def _stream(event: Mapping[str, Any]) -> object:
    return event["args"]["stream"]


def _span(event: Mapping[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _merged(spans: Iterable[Span]) -> list[Span]:
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
