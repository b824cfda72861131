"""The layers of the package: each imports only those above it in the list.

Read from the syntax of every file, so imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_bpipe"
LAYERS = [
    *("schedule", "placement", "report", "simulate", "estimate", "planner"),
    *("runtime", "integration", "cli"),
]
PURE = LAYERS[:6]  # neither torch nor Megatron
FORBIDDEN = {
    **{layer: {"torch", "megatron"} for layer in PURE},
    "runtime": {"megatron"},
    "integration": set(),
    "cli": {"megatron"},
    "": {"megatron"},  # the package's own files
}
# Floors within a layer: a folder (with a dot at its end, its own files only) and what lies above.
FLOORS = (
    ("simulate.", ("simulate.draw", "simulate.recorded")),
    ("simulate.draw", ("simulate.recorded",)),
    ("estimate.", ("estimate.paper",)),
    ("estimate.memory", ("estimate.paper",)),
    ("estimate.time", ("estimate.paper",)),
    ("planner.", ("planner.output", "planner.check")),
    ("planner.inputs", ("planner.output", "planner.check")),
    ("runtime.transport", ("runtime.store", "runtime.executor", "runtime.observe")),
    ("runtime.", ("runtime.observe",)),
    ("runtime.observe", ("runtime.store", "runtime.executor")),
    (
        "integration.checks",
        (
            *("integration.patches", "integration.session", "integration.install"),
            *("integration.bootstrap", "integration.profile", "integration.single_gpu"),
            "integration.rank_mapping",
        ),
    ),
    (
        "integration.cpu",
        ("integration.session", "integration.install", "integration.profile"),
    ),
    (
        "integration.rank_mapping",
        ("integration.patches", "integration.session", "integration.install"),
    ),
    ("integration.single_gpu", ("integration.session", "integration.install")),
    ("integration.patches", ("integration.install", "integration.bootstrap")),
    ("integration.", ("integration.profile",)),
)
# a notebook asks the object itself for its drawing (`_repr_html_`), when it is shown
EXCEPTIONS = {("megatron_bpipe.simulate.result", "megatron_bpipe.simulate.draw.html.notebook_page")}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, strings given to importers included."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(
                    [*parents[: len(parents) - node.level + 1], *([base] if base else [])]
                )
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"(megatron|torch)(\.\w+)+", node.value)
        ):  # importlib.import_module("megatron.core"), a table of modules, ...
            yield node.lineno, node.value


def layer_of(name: str) -> str | None:
    """The layer a dotted name belongs to, "" for the package's own files, None for others."""
    root, _, rest = name.partition(".")
    if root != "megatron_bpipe":
        return None
    head = rest.split(".")[0]
    return head if head in LAYERS else ""


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    mine = layer_of(module)
    assert mine is not None
    found = []
    for line, name in imported(source, module, is_package):
        other, root = layer_of(name), name.split(".")[0]
        if root in FORBIDDEN[mine]:
            found.append(f"{module}:{line}: {mine or 'the package'} may not name {name}")
        elif other is not None and mine:
            below = other == "" and name.split(".")[1:] != ["__version__"]
            if below or (other in LAYERS and LAYERS.index(other) > LAYERS.index(mine)):
                found.append(f"{module}:{line}: {mine} may not import {name}")
            elif climbs(module, name):
                found.append(f"{module}:{line}: {name} lies on a floor above")
        elif mine == "schedule" and root not in sys.stdlib_module_names and other is None:
            found.append(f"{module}:{line}: schedule is plain Python, it may not import {name}")
    return found


def climbs(module: str, name: str) -> bool:
    """Whether ``name`` lies on a floor above ``module``'s."""
    if (module, name) in EXCEPTIONS:
        return False
    inside = f"{module.partition('.')[2]}."
    rest = name.partition(".")[2]
    for lower, above in FLOORS:
        own_files = lower.endswith(".")
        here = inside.startswith(lower if own_files else f"{lower}.")
        if own_files and inside.count(".") > lower.count(".") + 1:
            continue  # in a folder below
        if here and any(f"{rest}.".startswith(f"{upper}.") for upper in above):
            return True
    return False


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_layers(file):
    source = file.read_text(encoding="utf-8")
    assert violations(source, module_name(file), file.name == "__init__.py") == []


def test_every_folder_is_a_layer():
    folders = {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE}
    assert folders <= set(LAYERS)
    assert "schedule" in folders


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_bpipe.schedule.ops", "import torch"),
        ("megatron_bpipe.schedule.ops", "import numpy"),
        ("megatron_bpipe.schedule.ops", "def f():\n    from megatron.core import mpu"),
        ("megatron_bpipe.schedule.ops", "from ..placement import order"),
        ("megatron_bpipe.schedule.ops", "from .. import runtime"),
        ("megatron_bpipe.schedule.ops", "import megatron_bpipe.estimate.mfu"),
        ("megatron_bpipe.placement.order", "from ..simulate.run import go"),
        ("megatron_bpipe.estimate.mfu", "import torch.nn as nn"),
        ("megatron_bpipe.runtime.store", "importlib.import_module('megatron.core')"),
        ("megatron_bpipe.runtime.transport.ipc", "from ...integration import install"),
        ("megatron_bpipe.integration.install", "from ..cli.main import main"),
        ("megatron_bpipe.cli.run", "from megatron.training import pretrain"),
        ("megatron_bpipe.estimate.mfu", "import megatron_bpipe"),
        ("megatron_bpipe.integration.run", "import megatron_bpipe"),
        ("megatron_bpipe.simulate.engine", "from megatron_bpipe.simulate.draw import html"),
        ("megatron_bpipe.estimate.time.x", "from megatron_bpipe.estimate.paper.tables import y"),
        ("megatron_bpipe.runtime.transport.pair.x", "import megatron_bpipe.runtime.store"),
        ("megatron_bpipe.runtime.store", "from megatron_bpipe.runtime.observe.audit import Audit"),
        ("megatron_bpipe.integration.checks.x", "from megatron_bpipe.integration import session"),
    ],
)
def test_what_is_forbidden(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_bpipe.schedule.ops", "import enum\nfrom .base import one_f_one_b"),
        ("megatron_bpipe.simulate.run", "from ..schedule import Op\nimport matplotlib"),
        ("megatron_bpipe.runtime.store", "import torch\nfrom ..schedule.ops import Op"),
        ("megatron_bpipe.integration.install", "from megatron.core import mpu"),
        (
            "megatron_bpipe.cli.run",
            "from megatron_bpipe.integration.bootstrap.run_script import run_script",
        ),
        ("megatron_bpipe.estimate.mfu", "from megatron_bpipe import __version__"),
        ("megatron_bpipe.estimate.mfu", "'''megatron.core does this too.'''"),
        ("megatron_bpipe.simulate.draw.html", "from megatron_bpipe.simulate.draw import page"),
        ("megatron_bpipe.simulate.draw.html", "from megatron_bpipe.simulate.engine import run"),
        ("megatron_bpipe.runtime.observe.x", "from megatron_bpipe.runtime.graph import Kept"),
    ],
)
def test_what_is_allowed(module, source):
    assert violations(source, module) == []
