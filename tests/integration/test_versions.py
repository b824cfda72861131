"""Known releases: silent. Unknown ones: one warning, or a stop that names what is missing."""

from __future__ import annotations

import pytest

from megatron_bpipe.integration.checks.hook_points import KNOWN_RELEASES
from tests.harness import Megatron, Result
from tests.harness.overlays import RELEASES

WARNING = "has not been tried with bpipe"
WAYS = ("options", "flags")


def switch_on(megatron: Megatron, *arguments: str) -> tuple[Result, str]:
    result = megatron.script("unknown_release.py", list(arguments), world=4)
    return result, "".join(result.log(rank) for rank in range(4))


@pytest.mark.parametrize("way", WAYS)
def test_known_is_silent(megatron: Megatron, way: str) -> None:
    result, said = switch_on(megatron, way, "")
    assert result.ok, result.logs
    assert "bpipe" not in said


@pytest.mark.parametrize("way", WAYS)
def test_unknown_gives_one_warning_and_runs(megatron: Megatron, way: str) -> None:
    result, said = switch_on(megatron, way, "0.99.1")
    assert result.ok, result.logs
    assert said.count(WARNING) == 1
    assert "Megatron-Core 0.99 " in result.log(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("symbol", ["backward_step", "P2PCommunicator"])
def test_lacking_a_symbol_stops_all_ranks(megatron: Megatron, way: str, symbol: str) -> None:
    result, said = switch_on(megatron, way, "0.99.1", symbol)
    assert set(result.status.values()) == {2}
    assert said.count("--bpipe needs a Megatron that has") == 1
    assert f"schedules.{symbol}" in result.log(0)
    assert "is not there" in result.log(0)


def test_every_tried_release_is_known() -> None:
    assert {release.rpartition(".")[0] for release in RELEASES} <= set(KNOWN_RELEASES)
