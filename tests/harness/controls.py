"""Hooks of a rank that break something: faults, delays, and the controls of the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.harness.rank import after_each_step


def tamper_with_loads(job: dict[str, Any], byte: int) -> None:
    """Flip one bit of the first micro-batch that comes back (the control of the equality tests)."""
    from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport

    done = False
    stock = OneSidedTransport.load

    def load(self: Any, key: Any, pieces: list[torch.Tensor]) -> Any:
        nonlocal done
        transfer = stock(self, key, pieces)
        if not done:
            transfer.wait()
            largest = max(pieces, key=torch.Tensor.numel)
            largest[byte] ^= 0x40
            done = True
        return transfer

    OneSidedTransport.load = load  # type: ignore[method-assign]


def fault(job: dict[str, Any], rank: int, where: str, how: str, step: int = 2) -> None:
    """At the first ``where`` of training step ``step``, rank ``rank`` raises, dies or stops."""
    import signal

    from megatron_bpipe.integration.patches.stage import MegatronStage
    from megatron_bpipe.runtime.store import ActivationStore

    if int(os.environ["RANK"]) != rank:
        return
    steps = 1

    def count(step: int, model: Any, result: Any) -> None:
        nonlocal steps
        steps = step + 1

    after_each_step(count)
    owner = MegatronStage if where in ("forward", "backward") else ActivationStore
    stock = getattr(owner, where)

    def faulty(self: Any, *positional: Any) -> Any:
        if steps == step:
            Path(job["out"], "fault").write_text(where)
            if how == "raise":
                raise ValueError(f"injected into {where}")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return stock(self, *positional)

    setattr(owner, where, faulty)


def random_delays(job: dict[str, Any], seed: int, most: float) -> None:
    """Sleep at random before every computation and message of a stage (a stress test)."""
    import random
    import time

    from megatron_bpipe.integration.patches.stage import MegatronStage

    dice = random.Random(f"{seed} {os.environ['RANK']}")

    def delayed(stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *positional: Any) -> Any:
            time.sleep(dice.random() ** 3 * most)
            return stock(self, *positional)

        return call

    for name in ("forward", "backward", "exchange"):
        setattr(MegatronStage, name, delayed(getattr(MegatronStage, name)))


def lose_one_weight_gradient(job: dict[str, Any]) -> None:
    """Leave out one layer at every W (the control of the tests of split backwards)."""
    from megatron_bpipe.integration.patches.split_backward.weight_gradients import WeightGradients

    stock = WeightGradients.compute

    def compute(self: Any, key: Any) -> None:
        self._waiting[key].pop()
        stock(self, key)

    WeightGradients.compute = compute  # type: ignore[method-assign]


def wrong_at_the_turn(job: dict[str, Any]) -> None:
    """Change the first activation that turns on the last stage by one bit (a control)."""
    from megatron_bpipe.integration.patches.chunked_stage import ChunkedStage

    stock = ChunkedStage._turn
    done = False

    def turn(self: Any, key: Any, output: Any) -> None:
        nonlocal done
        stock(self, key, output)
        if not done:
            with torch.no_grad():
                self._inputs[key].view(torch.int32).view(-1)[0] ^= 1 << 20
            done = True

    ChunkedStage._turn = turn  # type: ignore[method-assign]


def tied_gradients_stay_apart(job: dict[str, Any]) -> None:
    """Leave the sum of the tied gradients out (a control)."""
    from megatron_bpipe.integration.patches.v_placement import install

    install.with_local_sum = lambda stock: stock  # type: ignore[assignment]


def hide_allocator(job: dict[str, Any], rank: int) -> None:
    """Let one rank's allocator say nothing, as an old C library would."""
    from megatron_bpipe.integration import measured_balance

    if int(os.environ["RANK"]) == rank:
        measured_balance.allocated_bytes = lambda device: None


def every_copy_counts(job: dict[str, Any]) -> None:
    """Let Chimera's norm of gradients have every part twice (a control)."""
    from megatron.core.optimizer import optimizer

    optimizer.param_is_not_shared = lambda parameter: True
