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


def flush_unexpectedly(job: dict[str, Any], after: int) -> None:
    """Throw away what has run ahead after a step that nothing announced."""
    from megatron_bpipe.integration.install import session
    from tests.harness.rank import after_each_step

    def flush(step: int, model: Any, result: Any) -> None:
        current = session()
        assert current is not None
        if step == after:
            assert current.pipeline is not None
            assert current.pipeline.carries
            current.flush()

    after_each_step(flush)


def started_earlier(job: dict[str, Any], after: int, minutes: int) -> None:
    """From a step on the run has lasted so many minutes.

    Megatron counts from its import, which a test's rank may have behind it for long.
    """
    import time

    from megatron.training import training

    from tests.harness.rank import after_each_step

    def put_back(number: int, model: Any, result: Any) -> None:
        if number == after:
            training._TRAIN_START_TIME = time.time() - 60 * minutes

    after_each_step(put_back)


def signal_after(job: dict[str, Any], step: int) -> None:
    """Ask this rank to end, as a scheduler does, after a step."""
    import os
    import signal

    from tests.harness.rank import after_each_step

    def kill(number: int, model: Any, result: Any) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    after_each_step(kill)


def count_weight_buffers(job: dict[str, Any], size: int) -> None:
    """Write, per step, how many live storages have as many bytes as a certain weight."""
    import gc
    import json
    import os
    from pathlib import Path

    from tests.harness.rank import after_each_step

    counts: list[int] = []

    def count(step: int, model: Any, result: Any) -> None:
        alive = set()
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storage = thing.untyped_storage()
                if storage.nbytes() == size:
                    alive.add(storage.data_ptr())
        counts.append(len(alive))
        Path(job["out"], f"buffers{os.environ['RANK']}.json").write_text(json.dumps(counts))

    after_each_step(count)


def count_gatherings(job: dict[str, Any]) -> None:
    """Write, per step, which collectives of several ranks were called since the one before."""
    import json
    import os
    from pathlib import Path

    import torch.distributed as dist

    from tests.harness.rank import after_each_step

    steps: list[list[str]] = []
    seen: list[str] = []

    def watched(name: str, stock: Any) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            if dist.get_world_size(named.get("group")) > 1:
                seen.append(name)
            return stock(*positional, **named)

        return call

    for name in ("all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast"):
        setattr(dist, name, watched(name, getattr(dist, name)))

    def note(step: int, model: Any, result: Any) -> None:
        steps.append(seen.copy())
        seen.clear()
        Path(job["out"], f"gatherings{os.environ['RANK']}.json").write_text(json.dumps(steps))

    after_each_step(note)
