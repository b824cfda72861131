"""Micro-batches that differ in size: room in advance, and a word when it was too little."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest

from megatron_bpipe.integration.options import Options
from megatron_bpipe.integration.stage_pools import StagePools, sizes_vary
from megatron_bpipe.runtime.store import ActivationStore, Measured


@pytest.mark.parametrize(
    ("config", "vary"),
    [
        ({}, False),
        ({"num_moe_experts": None, "variable_seq_lengths": False}, False),
        ({"num_moe_experts": 8}, True),
        ({"num_moe_experts": 8, "moe_pad_expert_input_to_capacity": True}, False),
        ({"variable_seq_lengths": True}, True),
        ({"num_microbatches_with_partial_activation_checkpoints": 2}, True),
    ],
)
def test_where_sizes_vary(config: dict[str, object], vary: bool) -> None:
    assert sizes_vary(SimpleNamespace(**config)) is vary


class Group:
    """Only to be referred to."""


def test_the_first_spill_is_said_once() -> None:
    group = Group()
    pools = StagePools(Options(bpipe=True), weakref.ref(group))
    assert pools.first_spill() is None  # nothing evicted
    transport = SimpleNamespace(spilled_bytes=0, hosted_bytes=0)
    pools.store = ActivationStore(lambda size: transport)
    pools.store.transport = transport  # type: ignore[assignment]
    assert pools.first_spill() is None
    transport.spilled_bytes, transport.hosted_bytes = 3 * 2**20, 4 * 2**20
    said = pools.first_spill()
    assert said is not None
    assert said.startswith("3.0 MiB of evicted activations found no room in the pool")
    assert "this rank's host memory (4.0 MiB of it)" in said
    assert pools.first_spill() is None


@pytest.mark.parametrize(
    ("sizes", "block", "said"),
    [
        ((4, 4, 4, 4), 5, None),  # a layer is little more than a part
        ((16, 0, 0, 0), 16, "16.00 MiB, as much as 4.0 of its 4 parts"),  # one recomputed layer
        ((8, 0, 8, 0), 8, "8.00 MiB, as much as 2.0 of its 4 parts"),
        ((16,), 16, None),  # whole
    ],
)
def test_storages_larger_than_parts_are_said_once(
    sizes: tuple[int, ...], block: int, said: str | None
) -> None:
    group = Group()
    pools = StagePools(Options(bpipe=True), weakref.ref(group))
    assert pools.coarse_parts() is None  # nothing evicted
    pools.store = ActivationStore(lambda size: None, parts=len(sizes))  # type: ignore[arg-type]
    mib = tuple(size * 2**20 for size in sizes)
    pools.store.measured[0] = Measured(mib, tuple(reversed(range(len(sizes)))), block * 2**20)
    text = pools.coarse_parts()
    assert text is None if said is None else text is not None and said in text
    assert pools.coarse_parts() is None
