"""A wheel in somebody else's repository carries no commit of it; a checkout carries its own."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from megatron_bpipe.integration.checks.versions import megatron_version


@pytest.mark.parametrize(
    ("checkout", "version"), [(False, "0.19.2rc1"), (True, "0.19.2rc1+1a2b3c4d")]
)
def test_a_commit_is_megatrons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: bool, version: str
) -> None:
    info = ModuleType("megatron.core.package_info")
    info.__file__ = str(tmp_path / "megatron" / "core" / "package_info.py")
    info.__version__ = "0.19.2rc1+1a2b3c4d"  # what Megatron makes of any repository around it
    if checkout:
        (tmp_path / ".git").mkdir()
    monkeypatch.setitem(sys.modules, "megatron.core.package_info", info)
    assert megatron_version() == version


def test_the_installed_wheel_is_called_what_it_is() -> None:
    from importlib.metadata import version

    found = Path(str(import_module("megatron.core.package_info").__file__))
    if (found.parents[2] / ".git").exists():
        pytest.skip("megatron.core comes from a checkout")
    assert megatron_version() == version("megatron-core")
