"""Megatron's loop over the transports for GPUs, on a stand-in for streams and driver.

It cannot replace a run on a GPU (tests/gpu); it shows what does not need one: every copy is waited
for before its bytes are used or its memory given away, since the stand-in makes copies as late as
the events allow, and the two ends agree.
"""

from __future__ import annotations

import pytest

from tests.harness import Megatron
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt
from tests.harness.stand_in_gpu import INSTEAD, NEEDS_COMPILER

pytestmark = NEEDS_COMPILER


@pytest.mark.parametrize(("transport", "replaced"), [("ipc", "shm"), ("nccl", "p2p")])
def test_bitwise_equal(megatron: Megatron, transport: str, replaced: str) -> None:
    hook = {"call": INSTEAD, "with": {"transport": transport}}
    flags = [*gpt(4), "--bpipe", "--bpipe-transport", replaced]
    stock, bpipe = megatron.train(gpt(4)), megatron.train(flags, hooks=(hook,))
    assert difference(stock, bpipe) is None
    assert evicted(bpipe) > 0
    assert bpipe.memory["stages"][3]["pool_bytes"] > 0
    assert [stage["hosted_bytes"] for stage in bpipe.memory["stages"]] == [0, 0, 0, 0]


def test_one_flipped_bit_is_seen(megatron: Megatron) -> None:
    hook = {"call": INSTEAD, "with": {"transport": "ipc"}}
    tampered = megatron.train([*gpt(4), "--bpipe"], hooks=(hook, TAMPER))
    assert difference(megatron.train(gpt(4)), tampered) is not None


@pytest.mark.long
def test_a_copy_that_starts_too_early_is_seen(megatron: Megatron) -> None:
    hook = {"call": INSTEAD, "with": {"transport": "ipc"}}
    hasty = {"call": "tests.harness.stand_in_gpu.in_rank:hasty", "with": {}}
    early = megatron.train([*gpt(4), "--bpipe"], hooks=(hook, hasty))
    assert difference(megatron.train(gpt(4)), early) is not None
