"""Training under BPipe is bitwise what stock Megatron does.

Every case asserts that something was evicted: a run that moved nothing would prove nothing. And
one flipped bit in what comes back must show, or the comparison is blind.
"""

from __future__ import annotations

import pytest

from tests.harness import Megatron
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt

CASES = {
    "pp4 fp32": (4, gpt(4)),
    "pp4 bf16": (4, gpt(4, 8, None, "--bf16")),
    "pp4 evaluation between steps": (
        4,
        gpt(4, 8, None, "--eval-iters", "2", "--eval-interval", "3"),
    ),
    "pp8 fp32": (8, gpt(8, 9)),
    "pp8 bf16": (8, gpt(8, 9, None, "--bf16")),
}


@pytest.mark.parametrize("case", CASES)
def test_bitwise_equal(megatron: Megatron, case: str) -> None:
    world, flags = CASES[case]
    stock = megatron.train(flags, world=world)
    bpipe = megatron.train([*flags, "--bpipe"], world=world)
    assert difference(stock, bpipe) is None
    assert evicted(bpipe) > 0
    assert evicted(stock) == 0
    for stage in bpipe.memory["stages"]:
        assert stage["evicted_bytes"] == stage["loaded_bytes"]


def test_keep_local_is_equal_too(megatron: Megatron) -> None:
    stock = megatron.train(gpt(4))
    kept = megatron.train([*gpt(4), "--bpipe", "--bpipe-keep-local"])
    assert difference(stock, kept) is None
    assert evicted(kept) > 0
    # nothing was dropped: stage 0 still peaks at 4
    assert kept.memory["stages"][0]["peak_microbatches"] == 4


def test_one_flipped_bit_is_seen(megatron: Megatron) -> None:
    stock = megatron.train(gpt(4))
    tampered = megatron.train([*gpt(4), "--bpipe"], hooks=[TAMPER])
    assert difference(stock, tampered) is not None


def test_the_loss_falls(megatron: Megatron) -> None:
    states = megatron.train([*gpt(4), "--bpipe"]).states
    losses = [step["lm loss"] for step in states[-1]["losses"]]
    assert losses[0] - losses[-1] > 0.5
