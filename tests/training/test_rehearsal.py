"""The part of a rehearsal that needs no GPU: messages staged through host memory.

What needs one is in tests/gpu; that it is refused without one, in test_refusals.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import Megatron
from tests.harness.compare import difference, evicted
from tests.harness.models import gpt
from tests.training.combinations import COMBINATIONS


def test_staged_messages_arrive_in_order(megatron: Megatron, tmp_path: Path) -> None:
    result = megatron.script("staged_messages.py", [str(tmp_path)], world=2)
    assert result.ok, result.logs
    for rank, other in ((0, 1), (1, 0)):
        received = json.loads((tmp_path / f"{rank}.json").read_text())
        assert received == [[10.0 * other + i] for i in range(4)]


def test_stages_that_take_turns_do_not_wait_for_each_other(megatron: Megatron) -> None:
    """The benchmark's lock: held through a transfer, never through a message."""
    hook = {"call": "tests.harness.settings:one_stage_at_a_time", "with": {}}
    stock, turns = megatron.train(gpt(4)), megatron.train([*gpt(4), "--bpipe"], hooks=(hook,))
    assert difference(stock, turns) is None
    assert evicted(turns) > 0
    for rank in range(4):
        seconds = json.loads((turns.out / f"turns{rank}.json").read_text())
        assert len(seconds) == len(turns.states[rank]["losses"])
        assert all(s > 0 for s in seconds)


@pytest.mark.parametrize(
    ("name", "collectives"),
    [("pp4", {"allreduce"}), ("dp2 distributed optimizer, both overlaps", {"gather", "scatter"})],
)
def test_messages_and_collectives_of_a_rehearsal_change_nothing(
    megatron: Megatron, name: str, collectives: set[str]
) -> None:
    case = COMBINATIONS[name]
    hook = {"call": "tests.harness.settings:as_in_a_rehearsal", "with": {}}
    stock = megatron.train(case.flags, world=case.world)
    staged = megatron.train(case.flags, world=case.world, hooks=(hook,))
    assert difference(stock, staged) is None
    used = json.loads((staged.out / "used0.json").read_text())
    assert "messages" in used
    for word in collectives:
        assert any(word in one for one in used), used
