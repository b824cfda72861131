"""How far a piece of work has come: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


class Progress:
    """One piece of work; the caller says how far it is."""

    def __init__(self, name: str, total: int) -> None:
        """``total`` is in the caller's unit; the bar shows a percentage."""
        self.name, self._total, self._done = name, total, 0
        self._start = time.monotonic()
        self._bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # a thread, and ranks are forked from this process
            shape = "{desc:<34.34} {bar:30} {percentage:3.0f}%  {elapsed}"
            self._bar = tqdm(total=total, desc=name, bar_format=shape, file=sys.stdout)
        else:
            print(f"{name} ...", flush=True)

    def to(self, done: int) -> None:
        """It has come to ``done``; never beyond the total."""
        done = min(done, self._total)
        if self._bar is not None and done > self._done:
            self._bar.update(done - self._done)
        self._done = max(done, self._done)

    def add(self, more: int) -> None:
        """It has come further by ``more``."""
        self.to(self._done + more)

    def note(self, text: str) -> None:
        """What there is to say of it now: beside the bar, or as a line of its own."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self.name}: {text}")
        else:
            seconds = time.monotonic() - self._start
            print(f"{self.name}: {text}  ({seconds:.0f} s)", flush=True)

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Fill the bar if all went well, and leave it on the screen."""
        if self._bar is not None:
            if kind is None:
                self.to(self._total)
            self._bar.close()
