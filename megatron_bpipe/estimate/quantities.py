"""Quantities with units as people write them: 12ms, 300GB/s, 3.5GiB."""

from __future__ import annotations

import math
import re

_NUMBER = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*")
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
BYTES = {
    **{"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    **{"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
BANDWIDTH = {f"{unit}/s": factor for unit, factor in BYTES.items()} | {
    "Gb/s": 1e9 / 8,
    "Mb/s": 1e6 / 8,
}


class UnitError(ValueError):
    """A text that is no quantity; says what to write."""


def seconds(text: str) -> float:
    """A time in seconds; raises UnitError."""
    return _read(text, SECONDS, "a time", "12ms")


def size(text: str) -> int:
    """A number of bytes; raises UnitError."""
    return round(_read(text, BYTES, "a size", "3.5GiB"))


def bandwidth(text: str) -> float:
    """Bytes a second; raises UnitError, also for zero."""
    value = _read(text, BANDWIDTH, "a bandwidth", "300GB/s")
    if value == 0:
        raise UnitError(f"{text!r} is no bandwidth: more than 0, for example 300GB/s")
    return value


def _read(text: str, units: dict[str, float], what: str, example: str) -> float:
    match = _NUMBER.fullmatch(text)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or match[2] not in units or not number < math.inf:
        raise UnitError(
            f"{text!r} is not {what}: write a number and one of {', '.join(units)}, for example "
            f"{example}"
        )
    return number * units[match[2]]
