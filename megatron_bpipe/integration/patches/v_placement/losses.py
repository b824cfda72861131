"""Hands the losses from stage 0, which makes them, to stage p-1, where Megatron looks for them.

``train_step``, ``evaluate``, the log, TensorBoard and W&B all belong to the last rank.  What is
sent is what Megatron's schedule returns there: a small list, once for each call of the schedule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def at_the_last_stage(losses: list[Any], group: Any) -> list[Any]:
    """Stage 0's ``losses`` on stage p-1, nothing elsewhere; collective of stages 0 and p-1."""
    first, last = dist.get_global_rank(group, 0), dist.get_global_rank(group, group.size() - 1)
    if group.rank() == 0:
        dist.send_object_list([_on(losses, torch.device("cpu"))], dst=last, group=group)
    elif group.rank() == group.size() - 1:
        received: list[Any] = [None]
        dist.recv_object_list(received, src=first, group=group)
        return list(_on(received[0], torch.device(torch.cuda.current_device())))
    return []


def tokens_everywhere(tokens: Any, group: Any) -> None:
    """Overwrite every stage's number of tokens with that of stage 0, which has the losses."""
    dist.broadcast(tokens, src=dist.get_global_rank(group, 0), group=group)


def _on(value: Any, device: torch.device) -> Any:
    """The same with all tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on(item, device) for item in value)
    return value
