"""Apply ``--bpipe-placement``: move ranks only where that brings a pair onto one node."""

from __future__ import annotations

import os
from typing import Any

from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.rank_mapping.launcher import launched_process
from megatron_bpipe.integration.rank_mapping.mapping import (
    MEGATRON_ORDER,
    RankMap,
    incompatible_flags,
    set_rank,
    shape_of,
)
from megatron_bpipe.placement import make_report


def apply_placement(args: Any, placement: str) -> RankMap | None:
    """Give this process its logical rank; call it before Megatron reads ``RANK``.

    None where no launcher has started a job: arguments are only being parsed.

    Raises:
        Abort: the environment or the arguments do not allow it; rank 0 has said why.
    """
    if "WORLD_SIZE" not in os.environ and "SLURM_PROCID" not in os.environ:
        return None
    try:
        if placement != MEGATRON_ORDER and not _helps(args):
            placement = MEGATRON_ORDER
        conflicts = incompatible_flags(args) if placement != MEGATRON_ORDER else []
        for flag, value, remedy in conflicts:
            abort(f"--bpipe-placement {placement} cannot run with {flag} {value}; {remedy}")
        return set_rank(args, placement)
    except ValueError as error:
        abort(str(error), on_every_rank=True)


def _helps(args: Any) -> bool:
    """Whether Megatron's own order leaves pairs on different nodes."""
    me = launched_process(os.environ)
    report = make_report(shape_of(args, me.world), me.ranks_per_node(), "pair-adjacent")
    return report.before.pairs.across_nodes > report.after.pairs.across_nodes
