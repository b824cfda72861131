"""Files that a command is asked to write: looked at before anything is computed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


class OutputError(ValueError):
    """A place that cannot be written to; names the flag, its value and the remedy."""


def check_output(flag: str, path: Path | None, endings: Sequence[str]) -> None:
    """Raises OutputError unless ``path`` has one of the endings and can be written."""
    if path is None:
        return
    if path.suffix not in endings:
        raise OutputError(f"{flag} {path}: the name must end in {' or '.join(endings)}")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {folder}; make it first")
    if path.is_dir():
        raise OutputError(f"{flag} {path}: that is a folder; name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OutputError(f"{flag} {path}: may not be written; choose another place")


def written(path: Path) -> None:
    """Say where a file is, on stderr: stdout may be data."""
    print(f"written: {path}", file=sys.stderr)
