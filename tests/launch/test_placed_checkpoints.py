"""A checkpoint written under one placement loads under the other, bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Megatron
from tests.harness.models import gpt
from tests.launch import PLACEMENT_FLAG

ORDERS = ("megatron", "pair-adjacent")


@pytest.mark.long
@pytest.mark.skipif(not PLACEMENT_FLAG, reason="there is no flag --bpipe-placement yet")
@pytest.mark.parametrize(("saved", "loaded"), [ORDERS, ORDERS[::-1]])
def test_resume_under_the_other_placement(
    megatron: Megatron, tmp_path: Path, saved: str, loaded: str
) -> None:
    flags = [*gpt(4), "--bpipe", "--ckpt-format", "torch_dist"]
    save = ["--save", str(tmp_path), "--save-interval", "2"]
    first = megatron.train([*flags, *save, "--bpipe-placement", saved], steps=4)
    assert first.ok, first.logs
    load = ["--load", str(tmp_path), "--ckpt-step", "2"]
    second = megatron.train([*flags, *load, "--bpipe-placement", loaded], steps=4)
    assert second.ok, second.logs
    assert second.memory["losses"] == first.memory["losses"][2:]
    assert len(second.memory["losses"]) == 2
