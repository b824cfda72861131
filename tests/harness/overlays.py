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
# What a release imports beside torch and numpy.
ALSO = {"0.17.1": ["pyyaml"], "0.18.2": ["pyyaml"]}
INSTALL_SECONDS = 180


class NoOverlay(Exception):  # noqa: N818
    """The registry could not be reached, or has no such release."""


def overlay(release: str, cache: Path = CACHE) -> Path:
    """The folder that has ``megatron`` of ``release``, installed if it is not there yet.

    Raises:
        NoOverlay: it cannot be installed; says why.
    """
    folder = cache / release
    if folder.is_dir():
        return folder
    cache.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{release}-", dir=cache))
    try:
        _install([f"megatron-core=={release}", *ALSO.get(release, [])], unfinished)
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
