"""Messages to the user, through Megatron's own printing, on one rank."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from typing import NoReturn

from megatron_bpipe.integration.checks.hook_points import TRAINING_UTILS

logger = logging.getLogger("megatron_bpipe")


def log_rank0(message: str) -> None:
    """Log a line once, on rank 0."""
    if not _rank_zero():
        return
    training_utils = sys.modules.get(TRAINING_UTILS)
    if training_utils is not None:
        training_utils.print_rank_0(f"bpipe: {message}")
    else:
        logger.warning(message)


def log_rank(message: str) -> None:
    """Log a line that only this rank knows, on whichever rank this is."""
    sys.stderr.write(f"bpipe: {message}\n")
    sys.stderr.flush()


def _rank_zero() -> bool:
    # Megatron's helpers speak on every rank before torch.distributed is up.
    return int(os.environ.get("RANK", "0")) == 0


class Abort(SystemExit):
    """Training cannot start as asked; the process ends with status 2."""


def abort(message: str, *, on_every_rank: bool = False) -> NoReturn:
    """End this rank before training; rank 0 says why, the others stay silent.

    Args:
        message: what was wrong, with the value, and what to do.
        on_every_rank: for what only some ranks can see, such as a node unlike the others.

    Raises:
        Abort: always.
    """
    if on_every_rank or _rank_zero():
        sys.stderr.write(f"bpipe: {message}\n")
        sys.stderr.flush()
    _tell_torchrun(message, on_every_rank=on_every_rank)
    raise Abort(2)


def _tell_torchrun(message: str, *, on_every_rank: bool) -> None:
    """Leave the message where torchrun looks for the cause of a failure.

    torchrun ends with dozens of lines on which rank failed when; its last ones are the "root cause
    (first observed failure)", which is then this message. Of each node one rank is the first.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    first = on_every_rank or os.environ.get("LOCAL_RANK", "0") == "0"
    shown = f"bpipe: {message}" if first else "bpipe: stopped, see the root cause"
    when = int(time.time()) - (1 if first else 0)
    document = {
        "message": {"message": shown, "extraInfo": {"py_callstack": shown, "timestamp": when}}
    }
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(document, file)
