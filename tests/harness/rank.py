"""What runs inside one forked rank: the real script, with probes that only look (or tamper)."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run(job: dict[str, Any]) -> None:
    """Run the job's script as `python -m megatron_bpipe run` would."""
    from megatron_bpipe.integration.bootstrap.run_script import run_script

    if job["dump_at"] is None:
        sys.argv = [job["script"], *job["argv"]]
        runpy.run_path(job["script"], run_name="__main__")
        return
    job["physical"] = int(os.environ["RANK"])
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
        chunks = model if isinstance(model, list) else [model]
        for number, chunk in enumerate(chunks):
            for name, parameter in chunk.named_parameters():
                name = f"{number}.{name}" if len(chunks) > 1 else name
                state["params"][name] = parameter.detach().clone()
                gradient = getattr(parameter, "main_grad", parameter.grad)
                if gradient is not None:
                    state["grads"][name] = gradient.detach().clone()
        where = [int(os.environ["RANK"]), job["physical"]]
        Path(job["out"], f"placed{where[1]}").write_text(json.dumps(where))
        torch.save(state, Path(job["out"], f"state{os.environ['RANK']}.pt"))

    after_each_step(dump)
