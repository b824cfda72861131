"""Process groups made anew in one process, and collectives of all ranks before the first message.

The runs have a barrier of the pipeline's group at its first batched message, as NCCL builds its
communicator there, and Megatron's timers at level 2, whose barrier of all ranks comes right after
an iteration has begun.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.schedule import balance, one_f_one_b, slots
from tests.harness import Megatron

RUNS = {6: (6,), 8: (4, 8)}  # layouts by ranks


@pytest.fixture(scope="module", params=RUNS)
def ranks(
    megatron: Megatron, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    """What each rank has found."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"layouts{world}")
    arguments = [str(folder), *map(str, RUNS[world])]
    result = megatron.script("layouts.py", arguments, world=world, timeout=200)
    assert result.ok, result.logs
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def test_every_layout_trains_as_stock(ranks: list[dict[str, Any]]) -> None:
    layouts = RUNS[len(ranks)]
    for rank in ranks:
        assert [one["stages"] for one in rank["found"]] == [*layouts, layouts[-1]]
        assert all(one["equal"] and one["tensors"] > 10 for one in rank["found"])


def test_every_layout_has_its_own_pairs_and_pools(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    for number, p in enumerate([*RUNS[world], RUNS[world][-1]]):
        schedule = balance(one_f_one_b(p, p + 2))
        for rank, seen in enumerate(ranks):
            one, data_parallel = seen["found"][number], world // p
            stage, replica = divmod(rank, data_parallel)
            evicts = stage < p // 2 and slots(schedule, stage) > 0
            lends = stage >= p // 2 and slots(schedule, p - 1 - stage) > 0
            assert (one["evicted"] > 0, one["lent"] > 0) == (evicts, lends)
            first, second = (min(stage, p - 1 - stage), max(stage, p - 1 - stage))
            pair = [str(s * data_parallel + replica) for s in (first, second)]
            assert one["pair"] == ("-".join(pair) if evicts or lends else "")


def test_an_iteration_that_fails_leaves_nothing(ranks: list[dict[str, Any]]) -> None:
    """The script itself asserts that the pools are gone; each rank had an error of its own."""
    assert {rank["failed"] for rank in ranks} >= {"ValueError", "RuntimeError"}
    assert all(rank["failed"] for rank in ranks)
