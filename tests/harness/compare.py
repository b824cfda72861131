"""Bitwise comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable
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


def difference_across_placements(
    stock: Result, v_placed: Result, stages: int, layers: int = 1
) -> str | None:
    """As `difference`, of Megatron's interleaving with two chunks and the V placement.

    A parameter is known by its name in the whole model: chunk 1 of stage x is part p+x of the model
    in Megatron, part 2p-1-x under V.  ``layers`` are those of a part.
    """
    assert stock.ok, stock.logs
    assert v_placed.ok, v_placed.logs
    for what in ("params", "grads"):
        one = whole_model(stock, what, stages, layers, lambda x: stages + x)
        other = whole_model(v_placed, what, stages, layers, lambda x: 2 * stages - 1 - x)
        assert one
        assert one.keys() == other.keys()
        for name in one:
            if not torch.equal(one[name], other[name]):
                return f"{what} {name}"
    assert stock.states[-1]["losses"][0]
    return _losses(stock.states[-1]["losses"], v_placed.states[-1]["losses"])


def whole_model(
    result: Result, what: str, stages: int, layers: int, second: Callable[[int], int]
) -> dict[tuple[int, str], Any]:
    """What each rank dumped by (rank within the stage, name in the whole model).

    ``second`` gives the part that chunk 1 of a stage is; with one chunk a stage it is not asked.
    """
    found = {}
    ranks = len(result.states) // stages
    for rank, state in enumerate(result.states):
        stage, inner = divmod(rank, ranks)
        for name, tensor in state[what].items():
            chunk, _, rest = name.partition(".")
            chunked = chunk.isdigit()
            part = second(stage) if chunked and chunk == "1" else stage
            words = (rest if chunked else name).split(".")
            if "layers" in words:
                at = words.index("layers") + 1
                words[at] = str(int(words[at]) + part * layers)
            found[inner, ".".join(words)] = tensor
    return found
