"""Every flag that a message, a docstring or a page of the documentation names exists.

It is Megatron's (the installed release's parser is asked), this package's, or that of a tool that
is named here. Attributes read from Megatron's parsed arguments likewise.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_bpipe.cli import flags as cli_flags
from megatron_bpipe.integration.checks.arguments import OFFLOADING
from megatron_bpipe.integration.cpu.flags import CPU_FLAGS
from megatron_bpipe.integration.profile import flags as profile_flags
from tests.harness import ROOT, Megatron

PACKAGE = ROOT / "megatron_bpipe"
# whole ones: not --yarn-... and not --decoder-first/last-pipeline-num-layers
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*(?![\w/-])")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

OTHER_TOOLS = {
    "Slurm": {
        *("--distribution", "--ntasks", "--ntasks-per-node", "--nodes", "--partition"),
        *("--gpus-per-task", "--gpu-bind", "--kill-on-bad-exit", "--exclusive"),
    },
    "docker": {"--ipc", "--pid", "--shm-size"},
    "nvidia-smi": {"--query-gpu", "--format"},
    "the zero-bubble fork (docs/coming-from.md)": {
        *("--interleave-group-size", "--enable-zero-bubble", "--zero-bubble-max-pending-backward"),
        *("--zero-bubble-v-schedule", "--zero-bubble-v-schedule-mem-setup", "--enable-1f1b-v"),
        *("--offload-chunk-num", "--offload-time", "--enable-optimizer-post-validation"),
        *("--allow-padding-num-layers", "--profile-memory-iter"),
    },
}
# set by Megatron's validate_args, by torchrun's environment, or attributes of our own commands
DERIVED = {
    "params_dtype",
    "padded_vocab_size",
    "world_size",
    "rank",
    "encoder_num_layers",
    "curr_iteration",
    "do_valid",
    "consumed_train_samples",
}
CONFIG_ONLY = {"cpu_offloading"}


@pytest.fixture(scope="module")
def megatrons(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Flag to attribute, of Megatron's parser after ``install``."""
    path = tmp_path_factory.mktemp("flags") / "flags.json"
    result = megatron.script("list_flags.py", [str(path)], world=1)
    assert result.ok, result.logs
    found: dict[str, str] = json.loads(path.read_text())
    return found


def ours() -> set[str]:
    subparsers = argparse.ArgumentParser(allow_abbrev=False).add_subparsers()
    for module in pkgutil.iter_modules(cli_flags.__path__):
        importlib.import_module(f"{cli_flags.__name__}.{module.name}").add_parser(subparsers)
    parsers = [*subparsers.choices.values(), get_args_parser()]
    return {"--version"} | {
        option
        for parser in parsers
        for action in parser._actions
        for option in action.option_strings
    }


def in_source() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in FLAG.findall(node.value):
                    found.setdefault(flag, []).append(f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def in_pages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for flag in FLAG.findall(line):
                found.setdefault(flag, []).append(f"{page.relative_to(ROOT)}:{number}")
    return found


def of_scripts() -> set[str]:
    """Flags that the scripts and benchmarks define; pages show how to call them."""
    files = [*(ROOT / "scripts").rglob("*.*"), *(ROOT / "benchmarks").glob("*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.suffix in (".py", ".sh")]
    return {flag for text in texts for flag in FLAG.findall(text)}


def test_every_flag_of_a_message_exists(megatrons: dict[str, str]) -> None:
    known = set(megatrons) | ours() | set().union(*OTHER_TOOLS.values())
    assert {flag: places for flag, places in in_source().items() if flag not in known} == {}


def test_every_flag_of_a_page_exists(megatrons: dict[str, str]) -> None:
    known = set(megatrons) | ours() | of_scripts() | set().union(*OTHER_TOOLS.values())
    assert {flag: places for flag, places in in_pages().items() if flag not in known} == {}


def test_flags_made_from_attributes(megatrons: dict[str, str]) -> None:
    """The tables that pair an attribute with a flag, and those that make one from the other."""
    for attribute, flag in OFFLOADING.items():
        assert flag == attribute if attribute in CONFIG_ONLY else megatrons[flag] == attribute
    names = [*profile_flags.NEEDED, *(name for name, _, _ in profile_flags.REFUSED)]
    shards = ["tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"]
    for name in [*names, *shards]:
        assert megatrons.get(profile_flags._flag(name)) == name, name


def test_flags_of_the_cpu_backend(megatrons: dict[str, str]) -> None:
    assert [flag for flag, *_ in CPU_FLAGS if flag not in megatrons] == []


def test_attributes_of_the_arguments(megatrons: dict[str, str]) -> None:
    known = {*megatrons.values(), *DERIVED}
    unknown = []
    for file in sorted((PACKAGE / "integration").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = None
            if isinstance(node, ast.Attribute) and _is_args(node.value):
                name = node.attr
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                literal = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                if node.func.id in ("getattr", "hasattr") and _is_args(node.args[0]) and literal:
                    name = str(literal[0])
                elif node.func.id == "given" and isinstance(node.args[0], ast.Constant):
                    name = str(node.args[0].value)
            if name is not None and name not in known:
                unknown.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}")
    assert unknown == []


def _is_args(node: ast.AST) -> bool:
    """A variable or attribute called ``args``: Megatron's parsed arguments, in integration."""
    return (isinstance(node, ast.Name) and node.id == "args") or (
        isinstance(node, ast.Attribute) and node.attr == "args"
    )


def test_the_search_finds(tmp_path: Path) -> None:
    text = "use --no-overlap-p2p-comm, not a--b or --- or x--y; `--bpipe-budget N`, --a_b"
    assert FLAG.findall(text) == ["--no-overlap-p2p-comm", "--bpipe-budget", "--a_b"]
