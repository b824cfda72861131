"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Megatron

HERE = Path(__file__).parent
TRAINING = HERE / "training"
QUICK_STEPS = 4  # where the long tests are left out; what differs does after the first update
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["tests.results_table"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what trains, and say what runs beside what under pytest-xdist (scripts/test.sh).

    What lies in ``tests/training`` is marked ``trains``; elsewhere tests say so themselves.
    Trainings come first and all in one process, which shares their runs; the rest file by file.
    """

    def shares_runs(item: pytest.Item) -> bool:
        return "megatron" in getattr(item, "fixturenames", ())

    items.sort(key=shares_runs, reverse=True)  # the order within both stays
    for item in items:
        if item.path.is_relative_to(TRAINING):
            item.add_marker("trains")
        group = "training" if shares_runs(item) else str(item.path.relative_to(HERE))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def megatron(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Megatron]:
    """Runs of the real training loop on a dataset of real text."""
    from scripts.examples.prepare_data import write_dataset

    folder = tmp_path_factory.mktemp("megatron")
    data = write_dataset(folder / "text", max_bytes=512 * 2**10)
    runs = Megatron(folder, [*data.flags(), "--data-cache-path", str(folder / "cache")])
    if "not long" in pytestconfig.getoption("markexpr"):
        runs.steps = QUICK_STEPS
    yield runs
    runs.close()
