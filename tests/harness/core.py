"""Stock and ours in loops on megatron.core alone: core_loop.py and split_core_loop.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Megatron

RANKS = 4
TRANSPORTS = ("shm", "p2p")
IN_PARTS = ", in parts"  # at the end of a mode: with --bpipe-parts 4
INTERLEAVED_MODES = (
    "interleaved",
    "interleaved, messages not overlapped",
    "interleaved, variable lengths",
    "interleaved, variable lengths, messages not overlapped",
    "interleaved, variable lengths, in parts",
)
MODES = (
    "plain",
    "variable lengths",
    "partial checkpointing",
    "evaluation first",
    "SDPA",
    "outputs not deallocated",
    "gradients finalised",
    "own process groups",
    "plain, in parts",
    "variable lengths, in parts",
    *INTERLEAVED_MODES,
)


ZB_H1_CASES = tuple(f"zb-h1{how}" for how in ("", ", distributed", ", distributed, fused"))
BALANCED_CASES = tuple(f"bpipe {case}" for case in ZB_H1_CASES)
V_SHAPES = ("v-half", "v-min", "v-zb")


@dataclass(frozen=True)
class Outcome:
    """One mode over one transport.

    Attributes:
        equal: every rank's losses and gradients are bitwise those of stock.
        evicted: bytes that left stage 0.
    """

    equal: bool
    evicted: int

    @property
    def good(self) -> bool:
        """Equal, and something moved."""
        return self.equal and self.evicted > 0


def modes_of(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Those that the selected tests of the requesting module ask for."""
    items = (item for item in request.session.items if item.path == request.path)
    calls = (getattr(item, "callspec", None) for item in items)
    asked = {call.params.get("mode") for call in calls if call is not None}
    return tuple(mode for mode in MODES if mode in asked)


def core_loop(
    megatron: Megatron, folder: Path, modes: tuple[str, ...] = MODES, timeout: float = 180
) -> dict[tuple[str, str], Outcome]:
    """Outcome by mode and transport.

    Args:
        megatron: where to run.
        folder: an empty one, for the ranks' answers.
        modes: some of `MODES`.
        timeout: for all of them, in seconds.

    Raises:
        AssertionError: a rank failed; has the end of its output.
    """
    arguments = [json.dumps(modes), str(folder)]
    result = megatron.script("core_loop.py", arguments, world=RANKS, timeout=timeout)
    assert result.ok, result.logs
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    found = {}
    for mode in modes:
        for transport in TRANSPORTS:
            answers = [rank[f"{mode}, {transport}"] for rank in ranks]
            equal = all(answer["equal"] for answer in answers)
            found[mode, transport] = Outcome(equal, answers[0]["evicted"])
    return found


def split_loop(megatron: Megatron, folder: Path, *which: str) -> list[dict[str, Any]]:
    """What each rank found with schedules that split the backward: case -> bitwise equal.

    Args:
        megatron: where to run.
        folder: for the ranks' answers.
        which: ``zb-h1``, ``v``.

    Raises:
        AssertionError: a rank failed; has the end of its output.
    """
    result = megatron.script("split_core_loop.py", [str(folder), *which], world=RANKS, timeout=180)
    assert result.ok, result.logs
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
