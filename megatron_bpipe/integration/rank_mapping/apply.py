"""Apply ``--bpipe-placement``: move ranks only where that brings a pair onto one node."""

from __future__ import annotations

import os
from typing import Any

from megatron_bpipe.integration.log import refuse
from megatron_bpipe.integration.rank_mapping.launcher import started
from megatron_bpipe.integration.rank_mapping.mapping import (
    STOCK,
    RankMap,
    apply,
    refusals,
    shape_of,
)
from megatron_bpipe.placement import make_report


def place(args: Any, placement: str) -> RankMap | None:
    """Give this process its logical rank; call it before Megatron reads ``RANK``.

    None where no launcher has started a job: arguments are only being parsed.

    Raises:
        Refused: the environment or the arguments do not allow it; rank 0 has said why.
    """
    if "WORLD_SIZE" not in os.environ and "SLURM_PROCID" not in os.environ:
        return None
    try:
        if placement != STOCK and not _helps(args):
            placement = STOCK
        conflicts = refusals(args) if placement != STOCK else []
        for flag, value, remedy in conflicts:
            raise refuse(f"--bpipe-placement {placement} cannot run with {flag} {value}; {remedy}")
        return apply(args, placement)
    except ValueError as error:
        raise refuse(str(error), on_every_rank=True) from error


def _helps(args: Any) -> bool:
    """Whether Megatron's own order leaves pairs on different nodes."""
    me = started(os.environ)
    report = make_report(shape_of(args, me.world), me.ranks_per_node(), "pair-adjacent")
    return report.before.pairs.across_nodes > report.after.pairs.across_nodes
