"""Wheel and sdist build, and install into a clean environment with the console script."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSV = ["schedule", "--pp", "4", "--microbatches", "5", "--csv"]


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of what git would give."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; b.build_wheel('..'); b.build_sdist('..')"
    run(sys.executable, "-c", build, cwd=source)
    return folder


def test_wheel_installs_clean_and_its_script_is_the_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(built / "env", with_pip=True)
    python = built / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=built)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("megatron_bpipe/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_bpipe").rglob("*.py")}
    data = {
        "py.typed",
        *(f"simulate/draw/page{end}" for end in (".js", ".html", "_both.js", "_parts.js")),
    }
    assert packed == modules | {f"megatron_bpipe/{name}" for name in data}
    page = [*CSV[:5], "--html", built / "page.html"]
    run(python, "-m", "megatron_bpipe", "simulate", *page[1:], cwd=built)
    assert "</script>" in (built / "page.html").read_text()
    script = run(built / "env" / "bin" / "bpipe", *CSV, cwd=built)
    module = run(python, "-m", "megatron_bpipe", *CSV, cwd=built)
    here = run(sys.executable, "-m", "megatron_bpipe", *CSV, cwd=ROOT)
    assert script == module == here
    assert len(script.splitlines()) == 4
    # without torch and Megatron: only what needs them is missing
    assert "megatron-core" not in run(python, "-m", "pip", "list", cwd=built)


def test_sdist_has_what_a_reader_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"README.md", "LICENSE", "setup.py", "pyproject.toml", "CHANGELOG.md"}
    assert wanted <= names
    assert "megatron_bpipe/py.typed" in names
    assert "scripts/quickstart.sh" in names
    assert "tests/launch/fake_slurm/srun" in names
