"""The balanced partition against an exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.planner.partition import StageLimits, balanced_partition

limits = st.builds(
    StageLimits,
    layer=st.sampled_from([0.5, 1.0, 1.7, 2.0]),
    extra=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    most=st.integers(0, 6),
)


def slowest(stages: list[StageLimits], partition: tuple[int, ...]) -> float:
    return max(s.extra + k * s.layer for s, k in zip(stages, partition, strict=True))


@given(st.lists(limits, min_size=1, max_size=4), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_no_partition_is_faster(stages: list[StageLimits], layers: int) -> None:
    legal = [
        split
        for split in itertools.product(*(range(1, s.most + 1) for s in stages))
        if sum(split) == layers
    ]
    found = balanced_partition(stages, layers)
    if not legal:
        assert found is None
        return
    assert found in legal
    assert slowest(stages, found) <= min(slowest(stages, split) for split in legal) + 1e-9


def test_a_heavy_output_layer_takes_layers_off_the_last_stage() -> None:
    stages = [StageLimits(1, 0, 99)] * 3 + [StageLimits(1, 1.5, 99)]
    found = balanced_partition(stages, 20)
    assert found is not None
    assert found[-1] == 4  # 4 + 1.5 < 6, the pace of the fullest stage


def test_a_gpu_twice_as_fast_gets_twice_the_layers() -> None:
    stages = [StageLimits(2, 0, 99)] * 2 + [StageLimits(1, 0, 99)] * 2
    assert balanced_partition(stages, 24) == (4, 4, 8, 8)


def test_memory_moves_layers_to_where_there_is_room() -> None:
    stages = [StageLimits(1, 0, 3), *[StageLimits(1, 0, 99)] * 3]
    assert balanced_partition(stages, 15) == (3, 4, 4, 4)
