"""Messages to the user, through Megatron's own printing, on one rank."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("megatron_bpipe")


def say(message: str) -> None:
    """Tell the user something once, on rank 0."""
    if not _rank_zero():
        return
    utils = sys.modules.get("megatron.training.utils")
    if utils is not None:
        utils.print_rank_0(f"bpipe: {message}")
    else:
        logger.warning(message)


def warn(message: str) -> None:
    """Tell the user what only this rank knows."""
    sys.stderr.write(f"bpipe: {message}\n")
    sys.stderr.flush()


def _rank_zero() -> bool:
    # Megatron's helpers speak on every rank before torch.distributed is up.
    return int(os.environ.get("RANK", "0")) == 0


class Refused(SystemExit):
    """Training cannot start as asked; the process ends with status 2."""


def refuse(message: str, *, on_every_rank: bool = False) -> Refused:
    """Make the error that ends every rank; rank 0 says why, the others stay silent.

    ``on_every_rank``: for what only some ranks can see, such as a node unlike the others.
    """
    if on_every_rank or _rank_zero():
        sys.stderr.write(f"bpipe: {message}\n")
        sys.stderr.flush()
    return Refused(2)
