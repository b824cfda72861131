"""Other releases of Megatron-Core, each in a folder of its own beside the one torch.

The wheels are thin (10 MB without what they depend on). Nothing but the package registry is asked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.harness import ROOT

CACHE = ROOT / ".versions"
# The last patch of each supported minor release, oldest first.
RELEASES = ("0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
# What training loops up to 0.18 import beside torch and numpy; versions that fit each other.
ALSO = (
    *("pyyaml", "six", "regex"),
    *("pydantic==2.11.7", "pydantic-core==2.33.2", "annotated-types", "typing-inspection"),
)
INSTALL_SECONDS = 180


class NoOverlay(Exception):  # noqa: N818
    """The registry could not be reached, or has no such release."""


def overlay(release: str, cache: Path = CACHE) -> Path:
    """The folder that has ``megatron`` of ``release``, installed if it is not there yet.

    Raises:
        NoOverlay: it cannot be installed; says why.
    """
    return _installed(cache / release, [f"megatron-core=={release}"])


def also(cache: Path = CACHE) -> Path:
    """A folder with the small packages that the training loops of some releases import.

    Raises:
        NoOverlay: as for `overlay`.
    """
    return _installed(cache / "also", list(ALSO))


def _installed(folder: Path, packages: list[str]) -> Path:
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _install(packages, unfinished)
        if not folder.is_dir():  # another test run may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _install(packages: list[str], target: Path) -> None:
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is not None:
        command = [uv, "pip", "install", "--python", sys.executable]
    else:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--quiet", "--no-deps", "--target", str(target), *packages]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise NoOverlay(f"{packages[0]}: not installed within {INSTALL_SECONDS} s") from late
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise NoOverlay(f"{packages[0]}: {' '.join(last)}")
