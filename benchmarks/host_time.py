#!/usr/bin/env python3
"""Host time that one micro-batch's eviction costs: capture, E, EW, L, LW; no GPU needed.

    .venv/bin/python benchmarks/host_time.py [--layers 12 32] [--repeats 20] [--output FILE]

The layers save what Transformer Engine's do (``LayerNormLinear``, flash attention, ``Linear``,
``LayerNormMLP``): the same number of tensors, Parameters among them, through Functions of their
own; the tensors are tiny, so that nothing but the interpreter is timed. Nothing is copied: the
transport keeps its books and makes its views, and the copies are over when they are asked for.
What is timed is the processor time of the thread that also launches the computation, so that other
work on the machine hardly matters. A GPU's driver calls come on top.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment  # noqa: E402
from megatron_bpipe.runtime.store import ActivationStore  # noqa: E402
from megatron_bpipe.runtime.transport.copies import Part  # noqa: E402
from megatron_bpipe.runtime.transport.host.own import HostMemory  # noqa: E402
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport  # noqa: E402
from megatron_bpipe.schedule.ops import ActivationKey  # noqa: E402

HIDDEN, TOKENS = 8, 4
CPU = torch.device("cpu")
STEPS = ("capture", "E", "EW", "L", "LW")


class Module(torch.autograd.Function):
    """Saves its input, its Parameters and as many tensors of its own as it is told."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: int, *parameters: torch.Tensor) -> torch.Tensor:
        """Save ``own`` tensors beside the others."""
        made = [x + i for i in range(own)]
        ctx.save_for_backward(x, *made, *parameters)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Read what was saved."""
        saved = ctx.saved_tensors
        return gradient * 2 + saved[0] * 0, None, *(None for _ in ctx.needs_input_grad[2:])


class Layer:
    """One transformer layer's Functions and what each saves, as Transformer Engine 2.x has them."""

    def __init__(self) -> None:
        def parameters(count: int) -> list[torch.nn.Parameter]:
            return [torch.nn.Parameter(torch.ones(HIDDEN)) for _ in range(count)]

        # (tensors of its own, Parameters)
        self.qkv = 3, parameters(4)  # mean, 1/sigma, normalised; two weights, two biases
        self.projection = 0, parameters(2)
        self.mlp = 5, parameters(6)  # mean, 1/sigma, normalised, fc1's output, activation's

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """One forward."""
        h = Module.apply(x, self.qkv[0], *self.qkv[1])
        q, k, v = (h * 1.0).view(TOKENS, 1, HIDDEN).expand(TOKENS, 3, HIDDEN).unbind(1)
        h = Module.apply(q * k * v, 3)  # attention: output, log-sum-exp, random state
        h = Module.apply(h, self.projection[0], *self.projection[1])
        x = x + torch.nn.functional.dropout(h, 0.1)
        h = Module.apply(x, self.mlp[0], *self.mlp[1])
        return x + torch.nn.functional.dropout(h, 0.1)


class Over:
    """A transfer that takes no time; see `TransferHandle`."""

    span = 0.0, 0.0
    exposed = 0.0

    def wait(self) -> None:
        """Nothing is under way."""


class NoCopies:
    """See `Copies`."""

    def start(self, label: str, parts: Sequence[Part], *, out: bool) -> Over:
        """Copy nothing, but look at each address as a driver call would."""
        for part in parts:
            part.pool.data_ptr(), part.piece.data_ptr()
        return Over()

    def close(self) -> None:
        """Nothing to end."""


def measure(layers: int, repeats: int) -> dict[str, Any]:
    """Microseconds of each step for one micro-batch of ``layers`` layers, the best of all."""
    model = [Layer() for _ in range(layers)]
    store = ActivationStore(
        lambda size: OneSidedTransport("0-1", HostMemory("0-1", 4 * size, CPU), NoCopies())
    )
    times: dict[str, list[float]] = {step: [] for step in STEPS}
    key = ActivationKey(0)

    def timed(step: str, action: Callable[[], object]) -> object:
        start = time.thread_time()
        result = action()
        times[step].append((time.thread_time() - start) * 1e6)
        return result

    for repeat in range(repeats + 3):
        if repeat == 3:  # the pool is there, caches are warm
            for seconds in times.values():
                seconds.clear()
        x = torch.ones(TOKENS, HIDDEN, requires_grad=True)
        output = x
        for layer in model:
            output = layer(output)
        if repeat == 0:
            store.measure(key, output)
        timed("capture", lambda: store.capture(key, output))  # noqa: B023
        moved = timed("E", lambda: store.evict(key))
        timed("EW", lambda: store.finish_evict(key))
        timed("L", lambda: store.load(key))
        timed("LW", lambda: store.finish_load(key))
        output.sum().backward()
        store.consume(key)
        store.check_empty()
    store.close()
    best = {step: round(min(seconds), 1) for step, seconds in times.items()}
    return {"layers": layers, "bytes": moved, "microseconds": best}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 32])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the numbers here, too (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(layers, options.repeats) for layers in options.layers]
    print("layers " + " ".join(f"{step:>9}" for step in STEPS) + "   microseconds, best")
    for result in results:
        shown = " ".join(f"{result['microseconds'][step]:9.0f}" for step in STEPS)
        print(f"{result['layers']:6d} {shown}")
    if options.output is not None:
        document = {"environment": environment(), "results": results}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
