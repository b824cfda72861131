"""Loops on megatron.core, without its training loop and without its parser."""

from __future__ import annotations

import pytest

from tests.harness import Megatron
from tests.harness.core import IN_PARTS, MODES, TRANSPORTS, Outcome, core_loop, modes_of

LONG = (
    "interleaved, variable lengths, messages not overlapped",  # both are among the others
    *(mode for mode in MODES if mode.endswith(IN_PARTS)),
)
Outcomes = dict[tuple[str, str], Outcome]


@pytest.fixture(scope="module")
def found(
    megatron: Megatron, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Outcomes:
    return core_loop(megatron, tmp_path_factory.mktemp("core"), modes_of(request))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=pytest.mark.long) if m in LONG else m for m in MODES]
)
def test_bitwise_equal(found: Outcomes, mode: str, transport: str) -> None:
    assert found[mode, transport].equal
    assert found[mode, transport].evicted > 0
