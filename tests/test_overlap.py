"""The benchmarks' reading of a profiler's trace."""

from __future__ import annotations

from benchmarks.overlap import Overlap, overlap_of


def event(kind: str, start: float, seconds: float) -> dict:
    return {"cat": kind, "ts": start, "dur": seconds}


def test_copies_beside_kernels_of_any_stream() -> None:
    events = [
        event("gpu_memcpy", 0, 10),
        event("gpu_memcpy", 10, 5),  # touches the first: one span
        event("kernel", 4, 2),
        event("kernel", 5, 3),  # of another stream, overlapping
        event("kernel", 14, 10),
        event("cpu_op", 0, 100),
        {"ph": "M", "name": "process_name"},
    ]
    assert overlap_of(events) == Overlap(copies=15, kernels=14, beside=5)


def test_no_copies_no_overlap() -> None:
    assert overlap_of([event("kernel", 0, 1)]) == Overlap(0, 1, 0)
    assert overlap_of([]) == Overlap(0, 0, 0)
