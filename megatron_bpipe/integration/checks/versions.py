"""Which software ran: for ``doctor`` and ``memory.json``."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from megatron_bpipe import __version__
from megatron_bpipe.integration.checks.hook_points import PACKAGE_INFO


def megatron_version() -> str:
    """The importable Megatron-Core's version; of a checkout with its commit.

    Megatron appends the commit of whatever repository its folder lies in, which for a wheel in an
    environment inside a repository is somebody else's. Here a commit counts only where that
    repository is Megatron's own.
    """
    try:
        info = importlib.import_module(PACKAGE_INFO)
    except ImportError:
        return "of unknown version"
    checkout = (Path(str(info.__file__)).parents[2] / ".git").exists()
    return str(info.__version__) if checkout else str(info.__version__).partition("+")[0]


def package_versions() -> dict[str, str]:
    """Name and version of what decides how a run behaves, as it stands in ``memory.json``."""
    found = {
        "python": platform.python_version(),
        "megatron_bpipe": __version__,
        "megatron-core": megatron_version(),
        "torch": str(torch.__version__),
    }
    for name in ("transformer-engine", "flash-attn", "apex"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
