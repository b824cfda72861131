"""Loops on megatron.core, without its training loop and without its parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import Megatron

MODES = [
    "plain",
    "variable lengths",
    "partial checkpointing",
    "evaluation first",
    "SDPA",
    "outputs not deallocated",
    "gradients finalised",
    "own process groups",
]


@pytest.fixture(scope="module")
def found(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("core")
    result = megatron.script("core_loop.py", [json.dumps(MODES), str(folder)], world=4)
    assert result.ok, result.logs
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("transport", ["shm", "p2p"])
@pytest.mark.parametrize("mode", MODES)
def test_bitwise_equal(found: list[dict], mode: str, transport: str) -> None:
    ranks = [rank[f"{mode}, {transport}"] for rank in found]
    assert all(rank["equal"] for rank in ranks)
    assert ranks[0]["evicted"] > 0
