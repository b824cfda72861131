"""Pair-adjacent placement, acting: ranks really run where it says, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness import Megatron, Result
from tests.harness.models import gpt


def test_pairs_share_a_node_and_the_numbers_stay(megatron: Megatron) -> None:
    stock = megatron.train(gpt(4))
    placed = megatron.train([*gpt(4), "--bpipe"], nodes=2)
    assert placed.ok, placed.logs
    said = placed.log(0)
    assert said.count("ranks placed so that pairs share a node") == 1
    # the state dumps are named by logical rank, which is the stage here
    for one, other in zip(stock.states, placed.states, strict=True):
        assert one["params"].keys() == other["params"].keys()
        assert all(map(torch.equal, one["params"].values(), other["params"].values()))
    stages = {s["stage"]: s["rank"] for s in placed.memory["stages"]}
    assert stages == {0: 0, 1: 1, 2: 2, 3: 3}
    assert placed.placed == {0: 0, 3: 1, 1: 2, 2: 3}  # logical rank -> physical


def test_megatron_order_stays_where_asked_or_where_nothing_is_gained(megatron: Megatron) -> None:
    asked = megatron.train([*gpt(4), "--bpipe", "--bpipe-placement", "megatron"], nodes=2)
    one_node = megatron.train([*gpt(4), "--bpipe"])
    for result in (asked, one_node):
        assert result.ok, result.logs
        assert "ranks placed" not in result.log(0)
        assert result.placed == {0: 0, 1: 1, 2: 2, 3: 3}


ORDERS = ("megatron", "pair-adjacent")


@pytest.mark.long
@pytest.mark.parametrize(("saved", "loaded"), [ORDERS, ORDERS[::-1]])
def test_a_checkpoint_loads_under_the_other_placement(
    megatron: Megatron, tmp_path: Path, saved: str, loaded: str
) -> None:
    def train(placement: str, *more: str) -> Result:
        flags = [*gpt(4), "--bpipe", "--bpipe-placement", placement, "--ckpt-format", "torch_dist"]
        result = megatron.train([*flags, *more], nodes=2, dump_at=5)
        assert result.ok, result.logs
        assert result.placed[3] == (1 if placement == "pair-adjacent" else 3)
        return result

    train(saved, "--save", str(tmp_path), "--save-interval", "5", "--exit-interval", "5")
    resumed = train(loaded, "--load", str(tmp_path))
    whole = megatron.train(gpt(4))
    for one, other in zip(whole.states, resumed.states, strict=True):
        assert all(map(torch.equal, one["params"].values(), other["params"].values()))
