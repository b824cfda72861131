"""A rank that dies, stops or raises takes the job down with a message; nothing stays behind."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from tests.harness import Megatron, Result
from tests.harness.models import DATA_LOADERS, gpt


def shared_memory() -> set[str]:
    """What has a name."""
    return set(os.listdir("/dev/shm"))


def left_behind(before: set[str]) -> set[str]:
    """Shared memory that came and stays; what another run makes is gone in a moment."""
    left = shared_memory() - before
    for _ in range(50):
        if not left:
            break
        time.sleep(0.1)
        left &= shared_memory()
    return left


def alive(result: Result) -> list[int]:
    pids = json.loads((result.out / "pids").read_text()).values()
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def run(megatron: Megatron, rank: int, where: str, how: str, *flags: str) -> Result:
    before = shared_memory()
    hooks = [
        {"call": "tests.harness.controls:fault", "with": {"rank": rank, "where": where, "how": how}}
    ]
    arguments = [*gpt(4), *DATA_LOADERS, "--bpipe", "--distributed-timeout-minutes", "1", *flags]
    result = megatron.train(arguments, hooks=hooks, steps=4, timeout=200, fresh=True)
    assert (result.out / "fault").exists(), result.logs
    assert left_behind(before) == set()
    assert alive(result) == []
    return result


@pytest.mark.parametrize(
    ("where", "transport"),
    [
        *itertools.product(["forward", "backward", "evict", "load"], ["shm"]),
        *itertools.product(["evict", "load"], ["p2p"]),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                *itertools.product(["forward", "backward"], ["p2p"]),
                *itertools.product(["evict", "load"], ["host"]),
            ]
        ),
    ],
)
def test_a_rank_that_raises(megatron: Megatron, where: str, transport: str) -> None:
    result = run(megatron, 0, where, "raise", "--bpipe-transport", transport)
    assert all(code not in (0, None) for code in result.status.values()), result.status
    assert f"injected into {where}" in result.log(0)
    assert "bpipe: rank 0 (stage 0 of 4) failed at" in result.log(0)
    for other in (1, 2, 3):
        assert f"bpipe: rank {other} (stage {other} of 4) failed at" in result.log(other)
        assert "(micro-batch" in result.log(other)


@pytest.mark.parametrize(("rank", "where"), [(0, "evict"), (3, "forward"), (1, "backward")])
def test_a_rank_that_is_killed(megatron: Megatron, rank: int, where: str) -> None:
    result = run(megatron, rank, where, "kill")
    assert result.status.pop(rank) == -9
    for other, code in result.status.items():
        assert code not in (0, None)
        assert f"bpipe: rank {other} (stage {other} of 4) failed at" in result.log(other)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "p2p"])
@pytest.mark.parametrize(("rank", "where"), [(0, "load"), (3, "forward")])
def test_a_rank_that_stops(megatron: Megatron, rank: int, where: str, transport: str) -> None:
    began = time.monotonic()
    result = run(megatron, rank, where, "stop", "--bpipe-transport", transport)
    assert result.status.pop(rank) is None  # still stopped when the harness cleaned it up
    for other, code in result.status.items():
        assert code not in (0, None)
        assert f"bpipe: rank {other} (stage {other} of 4) failed at" in result.log(other)
    assert time.monotonic() - began > 50


@pytest.mark.parametrize("transport", [pytest.param("shm", marks=pytest.mark.long), "p2p"])
def test_random_delays_do_not_deadlock(megatron: Megatron, transport: str) -> None:
    flags = [*gpt(4), "--bpipe", "--bpipe-transport", transport]
    delays = {"call": "tests.harness.controls:random_delays", "with": {"seed": 1, "most": 0.1}}
    slow = megatron.train(flags, hooks=[delays], steps=3)
    # bitwise the same whatever the transport: the run that test_equality measures links in
    quick = megatron.train([*gpt(4), "--bpipe", "--bpipe-measure-links"], steps=3)
    assert slow.ok, slow.logs
    assert slow.memory["losses"] == quick.memory["losses"]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "p2p", "host"])
def test_a_thousand_iterations_leave_memory_flat(megatron: Megatron, transport: str) -> None:
    flags = [*gpt(4, hidden=32), *DATA_LOADERS, "--bpipe", "--bpipe-transport", transport]
    watch = {"call": "tests.harness.settings:watch_memory", "with": {}}
    result = megatron.train(flags, hooks=[watch], steps=1000, timeout=900)
    assert result.ok, result.logs
    for rank in range(4):
        rows = json.loads((result.out / f"memory{rank}.json").read_text())
        assert len(rows) == 1000
        early, late = rows[300:400], rows[900:]
        resident = [max(row[0] for row in part) for part in (early, late)]
        allocated = [min(row[1] for row in part) for part in (early, late)]
        assert resident[1] - resident[0] < 4 * 2**20
        # the report keeps each iteration's times and losses: a few hundred bytes
        assert allocated[1] - allocated[0] < 2**20
