"""The V placement on every supported release of Megatron-Core, in a loop without Megatron's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import Megatron
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
        result = runs.script("v_core_loop.py", [str(tmp_path)], world=4, timeout=180)
    finally:
        runs.close()
    assert result.ok, result.logs
    assert json.loads((tmp_path / "0.json").read_text()) == dict.fromkeys(
        ("v-half", "v-min", "v-zb"), True
    )
