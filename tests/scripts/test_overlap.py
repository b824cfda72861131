"""The benchmarks' reading of a profiler's trace."""

from __future__ import annotations

from benchmarks.overlap import Overlap, overlap_of

COMPUTE, COPY = 7, 20


def event(kind: str, start: float, seconds: float, stream: int, name: str = "") -> dict:
    return {"cat": kind, "ts": start, "dur": seconds, "name": name, "args": {"stream": stream}}


def test_copies_beside_kernels_of_any_stream() -> None:
    events = [
        event("gpu_memcpy", 0, 10, COPY, "Memcpy DtoD (Device -> Device)"),
        event("gpu_memcpy", 10, 5, COPY, "Memcpy DtoH (Device -> Pinned)"),  # touches the first
        event("gpu_memcpy", 40, 5, COMPUTE, "Memcpy DtoH (Device -> Pageable)"),  # not ours
        event("kernel", 4, 2, COMPUTE),
        event("kernel", 5, 3, 13),  # of another stream, overlapping
        event("kernel", 14, 10, COMPUTE),
        {"cat": "cpu_op", "ts": 0, "dur": 100, "name": "aten::mm"},
        {"ph": "M", "name": "process_name"},
    ]
    assert overlap_of(events) == Overlap(copies=15, kernels=14, beside=5)
    assert overlap_of(events, ("DtoD",)) == Overlap(copies=10, kernels=14, beside=4)


def test_no_copies_no_overlap() -> None:
    assert overlap_of([event("kernel", 0, 1, COMPUTE)]) == Overlap(0, 1, 0)
    assert overlap_of([]) == Overlap(0, 0, 0)
