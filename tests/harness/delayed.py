"""The reference of training without a flush: stock 1F1B with weights that are delayed by hand.

Knows nothing of versions, buffers or calls: before an iteration of Megatron's own schedule older
weights are copied over the parameters, after it, before the optimizer, the newest come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def delay_weights(job: dict[str, Any], lags: Sequence[int], flushes: Sequence[int] = ()) -> None:
    """Stage x computes iteration t at the weights of ``lags[x]`` updates before.

    After each of the iterations ``flushes`` (from 1) the count begins anew: no weights are older
    than the first after a flush.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    name = "forward_backward_pipelining_without_interleaving"
    stock = getattr(schedules, name)
    history: list[list[torch.Tensor]] = []
    iteration = 0

    def delayed(**named: Any) -> Any:
        nonlocal iteration
        if named.get("forward_only", False):
            return stock(**named)
        model = named["model"]
        parameters = list((model[0] if isinstance(model, list) else model).parameters())
        now = [p.detach().clone() for p in parameters]
        history.append(now)
        lag = lags[parallel_state.get_pipeline_model_parallel_rank()]
        _write(parameters, history[max(0, len(history) - 1 - lag)])
        losses = stock(**named)
        _write(parameters, now)
        iteration += 1
        if iteration in flushes:
            history.clear()
        return losses

    delayed.__signature__ = __import__("inspect").signature(stock)  # type: ignore[attr-defined]
    setattr(schedules, name, delayed)


def _write(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
