"""ZB-H1, BPipe on it and the V placement on every supported release of Megatron-Core.

In a loop without Megatron's own; ZB-H1 runs by default on the oldest (`test_oldest_version.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Megatron
from tests.harness.core import BALANCED_CASES, V_SHAPES, ZB_H1_CASES, split_loop
from tests.harness.overlays import RELEASES, NoOverlay, overlay

pytestmark = pytest.mark.long


@pytest.mark.parametrize("release", RELEASES)
def test_bitwise_equal_part_by_part(tmp_path: Path, release: str) -> None:
    try:
        folder = overlay(release)
    except NoOverlay as why:
        pytest.skip(f"cannot install Megatron-Core {release}: {why}")
    runs = Megatron(tmp_path, [], megatron=folder, core_only=True)
    try:
        answers = split_loop(runs, tmp_path, "zb-h1", "v")
    finally:
        runs.close()
    for answer in answers:
        cases = (*ZB_H1_CASES, *BALANCED_CASES, *V_SHAPES)
        assert [answer[case] for case in cases] == [True] * 9, answer
    assert all(answers[0][f"{case}, evicted"] > 0 for case in BALANCED_CASES)
