"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Megatron

HERE = Path(__file__).parent
TRAINING = HERE / "training"
QUICK_STEPS = 3  # where the long tests are left out; what differs does after the first update
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["tests.results_table"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what trains, and say what runs beside what under pytest-xdist (scripts/test.sh).

    What lies in ``tests/training`` is marked ``trains``; elsewhere tests say so themselves.
    What trains comes first, so that short tests are left to fill the last seconds. A file's tests
    stay in one process; trainings go function by function, unless their file sets something up.
    """

    def trains(item: pytest.Item) -> bool:
        return "megatron" in getattr(item, "fixturenames", ())

    items.sort(key=trains, reverse=True)  # the order within both stays
    sets_up = {item.path for item in items if _of_the_module(item)}
    for item in items:
        if item.path.is_relative_to(TRAINING):
            item.add_marker("trains")
        group = str(item.path.relative_to(HERE))
        if trains(item) and item.path not in sets_up:
            group += f", {getattr(item, 'originalname', item.name)}"
        item.add_marker(pytest.mark.xdist_group(group))


def _of_the_module(item: pytest.Item) -> bool:
    """Whether a fixture is shared by the tests of the file."""
    info = getattr(item, "_fixtureinfo", None)
    definitions = info.name2fixturedefs.values() if info is not None else ()
    return any(one.scope == "module" for several in definitions for one in several)


@pytest.fixture(scope="session")
def megatron(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Megatron]:
    """Runs of the real training loop on real text; pytest-xdist's workers share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(pytestconfig, "workerinput") else base) / "megatron"
    folder.mkdir(exist_ok=True)
    own = tmp_path_factory.mktemp("data")
    runs = Megatron(folder, [])
    written = runs.script("write_text.py", [str(own / "text")], world=1)  # imported there already
    assert written.ok, written.logs
    runs.data = json.loads((own / "text.json").read_text())
    runs.data += ["--data-cache-path", str(own / "cache")]
    if "not long" in pytestconfig.getoption("markexpr"):
        runs.steps = QUICK_STEPS
    yield runs
    runs.close()
