"""The search for the largest micro-batch that fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.max_fitting import max_fitting


@given(st.integers(0, 5000))
def test_finds_it_with_few_tries(limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert max_fitting(fits) == limit
    assert len(tried) == len(set(tried)) <= 2 * max(1, limit).bit_length() + 1
