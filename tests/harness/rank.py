"""What runs inside one forked rank: the real script, with probes that only look (or tamper)."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run(job: dict[str, Any]) -> None:
    """Run the job's script as `python -m megatron_bpipe run` would."""
    from megatron_bpipe.integration.launch import run_script

    if job["dump_at"] is None:
        sys.argv = [job["script"], *job["argv"]]
        runpy.run_path(job["script"], run_name="__main__")
        return
    _probe_training(job)
    for hook in job["hooks"]:
        module, name = hook["call"].split(":")
        getattr(importlib.import_module(module), name)(job, **hook["with"])
    run_script(job["script"], job["argv"])


def after_each_step(action: Callable[[int, Any, Any], None]) -> None:
    """Call ``action(step, model, result)`` after every training step, steps from 1."""
    from megatron.training import training

    stock = training.train_step
    step = 0

    def train_step(*positional: Any, **named: Any) -> Any:
        nonlocal step
        result = stock(*positional, **named)
        step += 1
        model = named.get("model", positional[2] if len(positional) > 2 else None)
        action(step, model, result)
        return result

    training.train_step = train_step


def _probe_training(job: dict[str, Any]) -> None:
    """Dump losses, gradients and parameters of this rank after the step asked for."""
    losses: list[dict[str, torch.Tensor]] = []

    def dump(step: int, model: Any, result: Any) -> None:
        losses.append(
            {k: v.detach().clone() for k, v in result[0].items() if isinstance(v, torch.Tensor)}
        )
        if step != job["dump_at"]:
            return
        state: dict[str, Any] = {"losses": losses, "params": {}, "grads": {}}
        for chunk in model if isinstance(model, list) else [model]:
            for name, parameter in chunk.named_parameters():
                state["params"][name] = parameter.detach().clone()
                gradient = getattr(parameter, "main_grad", parameter.grad)
                if gradient is not None:
                    state["grads"][name] = gradient.detach().clone()
        torch.save(state, Path(job["out"], f"state{os.environ['RANK']}.pt"))

    after_each_step(dump)


def tamper_with_loads(job: dict[str, Any], byte: int) -> None:
    """Flip one bit of the first micro-batch that comes back (the control of the equality tests)."""
    from megatron_bpipe.integration import install, session

    class Tampering(session.Session):
        pass

    done = False

    def flip(microbatch: int, pieces: list[torch.Tensor]) -> None:
        nonlocal done
        if not done:
            largest = max(pieces, key=torch.Tensor.numel)
            largest[byte] ^= 0x40
            done = True

    stock = session.Session.__init__

    def init(self: Any, *positional: Any, **named: Any) -> None:
        stock(self, *positional, **named)
        self.inspect_loaded = flip

    install.Session.__init__ = init  # type: ignore[method-assign]


def allocator_agrees(job: dict[str, Any]) -> None:
    """Dump, per op boundary, live bytes by weak reference and the allocator's own number."""
    import json

    from megatron_bpipe.runtime import recorder

    rows: list[list[Any]] = []
    stock = recorder.Recorder.op_done

    def op_done(self: Any, op: Any, start: float, end: float, moved: int) -> None:
        stock(self, op, start, end, moved)
        last = self.timeline[-1][-1]
        rows.append([str(op), last.live_bytes, self.allocated() - self._baseline])
        Path(job["out"], f"allocator{os.environ['RANK']}.json").write_text(json.dumps(rows))

    recorder.Recorder.op_done = op_done  # type: ignore[method-assign]
