"""One line on stderr that says what a slow command does now; only where stderr is a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def status_line(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What shows a text in place of the one before; nothing is left of it at the end."""
    shown = not quiet and sys.stderr.isatty()
    terminal = sys.stderr  # the command may redirect sys.stderr or stdout meanwhile

    def say(text: str) -> None:
        if shown:
            width = shutil.get_terminal_size().columns - 1
            terminal.write("\r\x1b[K" + text[:width])
            terminal.flush()

    try:
        yield say
    finally:
        say("")
