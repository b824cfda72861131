"""The oldest supported Megatron-Core, installed beside the newest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Megatron
from tests.harness.core import (
    BALANCED_CASES,
    MODES,
    TRANSPORTS,
    ZB_H1_CASES,
    Outcome,
    core_loop,
    modes_of,
    split_loop,
)
from tests.harness.overlays import RELEASES, NoOverlay, overlay

# what calls functions that changed since; scripts/version_matrix.py runs all modes on all releases
QUICK = ("plain", "gradients finalised", "own process groups", "interleaved")
Outcomes = dict[tuple[str, str], Outcome]


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Megatron]:
    try:
        folder = overlay(RELEASES[0])
    except NoOverlay as why:
        pytest.skip(f"cannot install Megatron-Core {RELEASES[0]}: {why}")
    runs = Megatron(tmp_path_factory.mktemp("oldest"), [], megatron=folder, core_only=True)
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def found(
    oldest: Megatron, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Outcomes:
    return core_loop(oldest, tmp_path_factory.mktemp("core"), modes_of(request))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "mode", [m if m in QUICK else pytest.param(m, marks=pytest.mark.long) for m in MODES]
)
def test_bitwise_equal(found: Outcomes, mode: str, transport: str) -> None:
    assert found[mode, transport].equal
    assert found[mode, transport].evicted > 0


def test_zb_h1_is_bitwise_equal(oldest: Megatron, tmp_path: Path) -> None:
    """Plain and under BPipe; all other releases, and the V placement: `test_split_backward.py`."""
    answers = split_loop(oldest, tmp_path, "zb-h1")
    for answer in answers:
        assert [answer[case] for case in (*ZB_H1_CASES, *BALANCED_CASES)] == [True] * 6, answer
    assert all(answers[0][f"{case}, evicted"] > 0 for case in BALANCED_CASES)


def test_it_is_known(oldest: Megatron) -> None:
    result = oldest.script("unknown_release.py", ["options", ""], world=1)
    assert result.ok, result.logs
    assert "has not been tried" not in result.log(0)
