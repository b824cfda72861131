"""``pretrain_gpt.py`` in which one rank fails: ``FAILS=PHYSICAL_RANK:ITERATION:STATUS``."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from megatron.training import training


def fail_at(rank: int, iteration: int, status: int) -> None:
    """Let this process end with ``status`` when it is that rank's turn to train."""
    stock, done = training.train_step, 0

    def train_step(*positional: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done == iteration and int(os.environ["BPIPE_PHYSICAL_RANK"]) == rank:
            os._exit(status)
        return stock(*positional, **named)

    training.train_step = train_step


if __name__ == "__main__":
    fail_at(*(int(word) for word in os.environ["FAILS"].split(":")))
    script = Path(__file__).resolve().parents[1] / "examples" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
