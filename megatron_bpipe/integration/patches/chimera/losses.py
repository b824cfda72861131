"""Losses of both directions on stage p-1, where Megatron looks for them.

Each direction's losses are summed over its micro-batches first, as Megatron does it on each
replica, so that the sum over both is what its reduction over replicas gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.patches.v_placement.losses import at_the_last_stage


def of_both_ends(losses: list[Any], group: Any, *, collected: bool) -> list[Any]:
    """On stage p-1 one entry for each direction; nothing elsewhere.

    Args:
        losses: of this stage, one for each micro-batch.
        group: the pipeline's; collective of stages 0 and p-1.
        collected: they are no losses but what ``collect_non_loss_data`` gave, which is kept as is.
    """
    own = losses if collected or not losses else [_summed(losses)]
    other = at_the_last_stage(own, group)
    return [*own, *other] if group.rank() == group.size() - 1 else []


def tokens_of_both(tokens: Any, group: Any) -> None:
    """Overwrite every stage's number of tokens with that of both ends together."""
    dist.all_reduce(tokens, group=group)


def _summed(losses: list[dict[str, Any]]) -> dict[str, Any]:
    """One value for each name: pairs of sum and count are added, single values averaged."""
    found = {}
    for name in losses[0]:
        values = [entry[name].view(-1) for entry in losses]
        single = values[0].numel() == 1
        found[name] = torch.cat(values).mean() if single else torch.vstack(values).sum(dim=0)
    return found
