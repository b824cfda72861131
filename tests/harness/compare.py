"""Bitwise comparison of two runs."""

from __future__ import annotations

from typing import Any

import torch

from tests.harness import Result


def difference(one: Result, other: Result) -> str | None:
    """None if losses, gradients and parameters of all ranks are bitwise equal, else what differs.

    Raises:
        AssertionError: a run failed, or dumped nothing to compare.
    """
    assert one.ok, one.logs
    assert other.ok, other.logs
    assert len(one.states) == len(other.states)
    for rank, (a, b) in enumerate(zip(one.states, other.states, strict=True)):
        assert a["params"]
        assert a["grads"]
        for what in ("params", "grads"):
            assert a[what].keys() == b[what].keys()
            for name in a[what]:
                if not torch.equal(a[what][name], b[what][name]):
                    return f"{what} {name} of rank {rank}"
        if problem := _losses(a["losses"], b["losses"]):
            return f"{problem} of rank {rank}"
    assert any(state["losses"][0] for state in one.states)
    return None


def _losses(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str | None:
    assert len(one) == len(other) > 0
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            if not torch.equal(a[name], b[name]):
                return f"{name} at step {step}"
    return None


def evicted(result: Result) -> int:
    """Bytes that left their stage in a run."""
    return sum(stage["evicted_bytes"] for stage in result.memory["stages"])
