"""Every symbol of Megatron in our source is a hook point, and every hook point is used.

Found by reading the source. Modules and objects of Megatron go by one name everywhere (`MODULES`,
`CLASSES`), which lets an attribute be traced to what it belongs to.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_bpipe.integration.checks import hook_points
from megatron_bpipe.integration.checks.hook_points import (
    FORWARD_BACKWARD,
    FORWARD_BACKWARD_INTERLEAVED,
    HOOK_POINTS,
)

PACKAGE = Path(__file__).parents[2] / "megatron_bpipe"
TABLE = PACKAGE / "integration" / "checks" / "hook_points.py"
FILES = sorted((PACKAGE / "integration").rglob("*.py"))

# a variable or attribute of this name is this module of Megatron
MODULES = {
    "schedules": hook_points.SCHEDULES,
    "parallel_state": hook_points.PARALLEL_STATE,
    "training": hook_points.TRAINING,
    "arguments": hook_points.ARGUMENTS,
    "initialize": hook_points.INITIALIZE,
    "checkpointing": hook_points.CHECKPOINTING,
    "dist_utils": hook_points.DIST_UTILS,
    "builder": hook_points.MODEL_BUILDER,
    "data_parallel": hook_points.DATA_PARALLEL,
    "finalize": hook_points.FINALIZE,
    "training_utils": hook_points.TRAINING_UTILS,
    "dataset_utils": hook_points.DATASET_UTILS,
    "fused_kernels": hook_points.FUSED_KERNELS,
    "moe_utils": hook_points.MOE_UTILS,
    "torch_norm": hook_points.TORCH_NORM,
    "tensor_parallel": hook_points.TENSOR_PARALLEL,
    "linear_layers": hook_points.LAYERS,
    "optimizers": hook_points.OPTIMIZER,
    "distrib_optimizer": hook_points.DISTRIBUTED_OPTIMIZER,
}
# a variable or attribute of this name is an instance of these classes of Megatron
CLASSES = {
    "communicator": ("P2PCommunicator",),
    "config": ("TransformerConfig",),
    "optimizer_config": ("OptimizerConfig",),
    "groups": ("ProcessGroupCollection", "GradFinalizeProcessGroups"),
    "timers": ("Timers",),
    "timer": ("Timer",),
    "ddp": ("DistributedDataParallel",),
    "DistributedDataParallel": ("DistributedDataParallel",),
    "gpt_model": ("GPTModel",),
    "decoder": ("TransformerBlock",),
    "block_spec": ("TransformerBlockSubmodules",),
    "submodules": ("TransformerLayerSubmodules", "SelfAttentionSubmodules"),
    "wrapped": ("WrappedTorchNorm",),
    "ProcessGroupCollection": ("ProcessGroupCollection",),
    "ChainedOptimizer": ("ChainedOptimizer",),
    "chain": ("ChainedOptimizer",),
    "AttnBackend": ("AttnBackend",),
    "AttnMaskType": ("AttnMaskType",),
}
# what runs when an instance is called
CALLED = {"timers": "__call__", "gpt_model": "forward"}
# what these have from torch and Python, not from Megatron
NOT_MEGATRON = {
    *("__file__", "modules", "parameters", "cuda"),
    "arguments",  # of inspect.BoundArguments, a dict
}

Use = tuple[str, str, int]  # what it belongs to, the symbol, the line


def known_symbols() -> set[tuple[str, str]]:
    """(module or class, symbol) of every hook point, its attributes and its class's."""
    found = set()
    for point in HOOK_POINTS:
        owner, _, last = point.name.rpartition(".")
        found.add((owner or point.module, last))
        found |= {(point.name, attribute.split()[0]) for attribute in point.attributes}
    return found


SYMBOLS = known_symbols()


def last_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


class Reader(ast.NodeVisitor):
    """Collects what a file takes of Megatron."""

    def __init__(self, tree: ast.AST) -> None:
        self.uses: list[Use] = []
        self.wrong: list[tuple[int, str]] = []
        self.imported: dict[str, str] = {}  # name here -> name there
        self.visit(tree)

    def owners(self, node: ast.AST) -> list[str]:
        name = last_name(node)
        if isinstance(node, ast.Name) and node.id in self.imported:
            return [self.imported[node.id]]
        if name in MODULES:
            return [MODULES[name]]
        return list(CLASSES.get(name or "", ()))

    def use(self, owner: ast.AST, symbol: str, line: int) -> None:
        owners = self.owners(owner)
        if owners and symbol not in NOT_MEGATRON:
            # an attribute of one of several classes: any of them will do
            known = [owner for owner in owners if (owner, symbol) in SYMBOLS]
            self.uses += [(owner, symbol, line) for owner in known or owners[:1]]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "megatron" and alias.name != "megatron.core":
                self.wrong.append((node.lineno, f"import {alias.name}: take it from a table"))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.split(".")[0] != "megatron":
            return
        for alias in node.names:
            whole = f"{module}.{alias.name}"
            if whole in MODULES.values():
                self.imported[alias.asname or alias.name] = whole
            else:
                self.uses.append((module, alias.name, node.lineno))
                self.imported[alias.asname or alias.name] = alias.name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.use(node.value, node.attr, node.lineno)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        name = last_name(node.value)
        for target in node.targets:
            if name in MODULES and isinstance(target, ast.Name) and target.id != name:
                self.wrong.append((node.lineno, f"{name} under another name: {target.id}"))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = last_name(node.func)
        if called in ("getattr", "hasattr", "setattr", "delattr", "replace"):
            literal = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            for symbol in literal:
                self.use(node.args[0], str(symbol), node.lineno)
        self._keywords(node, self._helpers(node, called))
        self.generic_visit(node)

    def _helpers(self, node: ast.Call, called: str | None) -> set[str]:
        """Names of the hook points that may be called here."""
        if called == "call_known":
            return {last_name(node.args[1]) or ""}
        if called in CALLED:
            self.use(node.func, CALLED[called], node.lineno)
            return {f"{owner}.{CALLED[called]}" for owner in self.owners(node.func)}
        if isinstance(node.func, ast.Attribute):
            owners = self.owners(node.func.value)
            return {f"{owner}.{called}" for owner in owners} | ({called or ""} if owners else set())
        return {called} if called in self.imported else set()

    def _keywords(self, node: ast.Call, helpers: set[str]) -> None:
        points = [point for point in HOOK_POINTS if point.name in helpers]
        known = {text.split()[0] for point in points for text in point.parameters}
        for keyword in node.keywords if points else ():
            if keyword.arg is not None and keyword.arg not in known:
                name = points[0].name
                self.wrong.append((node.lineno, f"{name} is given {keyword.arg}: not listed"))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"megatron(\.\w+)+", node.value):
            self.wrong.append((node.lineno, f"{node.value}: modules are named in hook_points.py"))


def read(file: Path) -> Reader:
    return Reader(ast.parse(file.read_text(encoding="utf-8")))


def label(file: Path) -> str:
    return str(file.relative_to(PACKAGE / "integration"))


@pytest.mark.parametrize("file", [f for f in FILES if f != TABLE], ids=label)
def test_no_other_symbol(file: Path) -> None:
    reader = read(file)
    unlisted = [
        f"line {line}: {symbol} of {owner}"
        for owner, symbol, line in reader.uses
        if (owner, symbol) not in SYMBOLS
    ]
    assert unlisted == []
    assert [f"line {line}: {what}" for line, what in reader.wrong] == []


def test_every_hook_point_is_used() -> None:
    used = {(owner, symbol) for file in FILES for owner, symbol, _ in read(file).uses}
    # a constant's name; a class that is there for its attributes
    otherwise = {FORWARD_BACKWARD.name, FORWARD_BACKWARD_INTERLEAVED.name}
    otherwise |= {point.name.partition(".")[0] for point in HOOK_POINTS if point.attributes}
    otherwise |= {point.name.partition(".")[0] for point in HOOK_POINTS if "." in point.name}
    assert {use for use in SYMBOLS - used if use[1] not in otherwise} == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("schedules.get_schedule_table(1)", "get_schedule_table"),
        ("call.schedules.parallel_state.get_tensor_model_parallel_rank()", "get_tensor_model"),
        ("from megatron.core.utils import get_attr_wrapped_model", "get_attr_wrapped_model"),
        ("from megatron.core import parallel_state as ps\nps.is_initialized()", "is_initialized"),
        ("getattr(config, 'new_option', None)", "new_option"),
        ("self.call.communicator.recv_everything()", "recv_everything"),
        ("patches.replace(training, 'pretrain', wrap)", "pretrain"),
        ("call.schedules.forward_step(new_argument=1)", "new_argument"),
        ("call_known(BACKWARD_STEP, call.schedules.backward_step, graph=1)", "graph"),
        ("after_import('megatron.core.optimizer', patch)", "megatron.core.optimizer"),
        ("other = schedules", "another name"),
        ("import megatron.core.optimizer", "take it from a table"),
    ],
)
def test_the_reader_finds(source: str, found: str) -> None:
    reader = Reader(ast.parse(source))
    said = [f"{o} {s}" for o, s, _ in reader.uses if (o, s) not in SYMBOLS]
    assert any(found in text for text in [*said, *(what for _, what in reader.wrong)])
