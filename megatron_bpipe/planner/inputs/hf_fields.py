"""The fields of a config.json, each checked when it is asked for, and which were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bpipe.estimate.errors import EstimateError


class Fields:
    """A config; ``read`` collects the names that were asked for."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """A field as it is, None where it is missing or null."""
        self.read.add(name)
        return self.data.get(name)

    def text(self, name: str) -> str:
        """A field that must be text; raises EstimateError."""
        value = self.get(name)
        if not isinstance(value, str):
            raise EstimateError(f"{self.path}: {name} is {value!r}: it must name the model's kind")
        return value

    def maybe_text(self, name: str) -> str | None:
        """Text, None where it is missing; raises EstimateError for anything else."""
        return None if self.get(name) is None else self.text(name)

    def number(self, name: str, default: int | None = None) -> int:
        """A positive whole number; raises EstimateError."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise EstimateError(f"{self.path}: {name} is missing: add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EstimateError(f"{self.path}: {name} is {value!r}: give a positive number")
        return value

    def maybe_number(self, name: str) -> int | None:
        """A whole number that may be missing or 0 (both None); raises EstimateError."""
        return None if self.get(name) in (None, 0) else self.number(name)

    def maybe_float(self, name: str) -> float | None:
        """A number that may be missing; raises EstimateError."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise EstimateError(f"{self.path}: {name} is {value!r}: give a number")
        return float(value)

    def maybe_map(self, name: str) -> Mapping[str, Any] | None:
        """A table that may be missing; raises EstimateError."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise EstimateError(f"{self.path}: {name} is {value!r}: a table is expected")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A switch."""
        value = self.get(name)
        return default if value is None else bool(value)

    def refuse(self, name: str, why: str) -> EstimateError:
        """The error for a field whose value has no counterpart."""
        return EstimateError(f"{self.path}: {name} is {self.data.get(name)!r}: {why}")
