"""The largest size that fits, with few tries. Pure."""

from __future__ import annotations

from collections.abc import Callable


def max_fitting(fits: Callable[[int], bool]) -> int:
    """The largest n from 1 up that fits, if all smaller ones do; 0 if 1 does not.

    Doubles until something does not fit, then halves the gap: about 2 log2(n) tries.
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
