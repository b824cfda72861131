"""Known releases: silent. Unknown ones: one warning, or a stop that names what is missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.integration.checks import probe
from megatron_bpipe.integration.checks.hook_points import BACKWARD_STEP, KNOWN_RELEASES
from megatron_bpipe.integration.checks.probe import HookPointError, call_known
from tests.harness import ROOT, Megatron, Result
from tests.harness.overlays import RELEASES, NoOverlay, also, overlay

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
    result, said = switch_on(megatron, way, "0.20.0")  # what main called itself in August 2026
    assert result.ok, result.logs
    assert said.count(WARNING) == 1
    assert "Megatron-Core 0.20 " in result.log(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("symbol", ["backward_step", "P2PCommunicator"])
def test_lacking_a_symbol_stops_all_ranks(megatron: Megatron, way: str, symbol: str) -> None:
    result, said = switch_on(megatron, way, "0.99.1", symbol)
    assert set(result.status.values()) == {2}
    assert said.count("--bpipe needs a Megatron that has") == 1
    assert f"schedules.{symbol}" in result.log(0)
    assert "is not there" in result.log(0)


def test_a_renamed_parameter_stops_all_ranks(megatron: Megatron) -> None:
    result, said = switch_on(megatron, "options", "", "forward_step:cp_group_size")
    assert set(result.status.values()) == {2}
    assert said.count("schedules.forward_step: does not take cp_group_size") == 1


def test_known_releases_are_those_that_are_tried() -> None:
    assert {release.rpartition(".")[0] for release in RELEASES} == set(KNOWN_RELEASES)


def helper_of_0_16(input_tensor, output_tensor, output_tensor_grad, model_type, config):
    return model_type, config


def helper_of_0_17(input_tensor, output_tensor, output_tensor_grad, config):
    return None, config


def helper_that_renames(input_tensor, output_tensor, output_tensor_grad, configuration):
    return None, configuration


GIVEN = {"input_tensor": 1, "output_tensor": 2, "output_tensor_grad": 3, "config": 4}


@pytest.mark.parametrize(
    ("version", "helper", "returned"),
    [
        ("0.14.0", helper_of_0_16, (5, 4)),
        ("0.16.1", helper_of_0_16, (5, 4)),
        ("0.17.0rc0", helper_of_0_16, (5, 4)),
        ("0.17.0rc0", helper_of_0_17, (None, 4)),
        ("0.17.1", helper_of_0_17, (None, 4)),
        ("0.19.2+6bdc5d0", helper_of_0_17, (None, 4)),
        ("0.20.0", helper_of_0_17, (None, 4)),
    ],
)
def test_what_a_release_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, version: str, helper: Any, returned: tuple[object, object]
) -> None:
    monkeypatch.setattr("megatron.core.package_info.__version__", version)
    probe._taken.cache_clear()
    assert call_known(BACKWARD_STEP, helper, **GIVEN, model_type=5) == returned


@pytest.mark.parametrize(
    ("version", "helper", "vanished"),
    [
        ("0.16.1", helper_of_0_17, "model_type"),
        ("0.19.0", helper_that_renames, "config"),
        ("0.20.0", helper_that_renames, "config"),
    ],
)
def test_what_vanished_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str, helper: Any, vanished: str
) -> None:
    monkeypatch.setattr("megatron.core.package_info.__version__", version)
    probe._taken.cache_clear()
    minor = version.rpartition(".")[0]
    with pytest.raises(
        HookPointError, match=f"does not take {vanished} in Megatron-Core {minor}; use a supported"
    ):
        call_known(BACKWARD_STEP, helper, **GIVEN, model_type=5)


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_each_release_has_its_hook_points(release: str, tmp_path: Path) -> None:
    """As the doctor sees them; the wheels before 0.18 have no training loop."""
    try:
        folder, needed = overlay(release), also()
    except NoOverlay as why:
        pytest.skip(f"cannot install Megatron-Core {release}: {why}")
    with_loop = release in RELEASES[-2:]
    features = ["schedule", *(["training", "cpu", "profile"] if with_loop else [])]
    source = """
        import sys
        from megatron_bpipe.integration import cpu
        cpu.install()
        from tests.harness.fork_server import use_megatron_of
        from pathlib import Path
        use_megatron_of(Path(sys.argv[1]))
        sys.path.append(sys.argv[2])
        from megatron_bpipe.integration.checks.probe import missing
        print("lacking:", [text for feature in sys.argv[3:] for text in missing(feature)])
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(folder), str(needed), *features]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "lacking: []" in done.stdout, done.stdout + done.stderr[-2000:]
