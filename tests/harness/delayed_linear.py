"""Megatron's linear layers with weight gradients put off as Transformer Engine's layers do it.

In Megatron's own training loop, on a CPU: a layer has a queue (``wgrad_store``), its backward fills
it, ``backward_dw`` computes the oldest entry, assigns it to ``weight.grad`` and runs the hooks that
Megatron's data parallelism has registered with the layer instead of with the weight.

After transformer_engine/pytorch/module/base.py and linear.py, 2.8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Store:
    """As TE's ``WeightGradStore``."""

    def __init__(self, delay: bool) -> None:
        self.delay, self.queue = delay, deque[tuple[torch.Tensor, torch.Tensor]]()

    def delay_wgrad_compute(self) -> bool:
        """Whether the layer was built to put its weight gradients off."""
        return self.delay


def product(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The weight's gradient."""
    return gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


class Linear(torch.autograd.Function):
    """A matrix product whose weight gradient waits, if the layer says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: Any) -> torch.Tensor:
        """Save the input."""
        ctx.save_for_backward(x, weight)
        ctx.store = layer.wgrad_store
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The input's gradient, and the weight's or nothing."""
        x, weight = ctx.saved_tensors
        if not ctx.store.delay:
            return gradient @ weight, product(x, gradient), None
        ctx.store.queue.append((x, gradient))
        return gradient @ weight, None, None


def like_transformer_engine(job: dict[str, Any], delay: bool, lose: bool = False) -> None:
    """Every linear layer but the head; with ``lose`` the first weight gradient is forgotten."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import layers

    init, wrap = GPTModel.__init__, DistributedDataParallel.__init__
    kinds = (layers.ColumnParallelLinear, layers.RowParallelLinear)
    lost = not lose

    def forward(
        layer: Any, input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any
    ) -> Any:
        output = Linear.apply(input, weight, layer)
        return output if bias is None else output + bias

    def backward_dw(layer: Any) -> None:
        nonlocal lost
        layer.weight.grad = product(*layer.wgrad_store.queue.popleft())
        if not lost:
            layer.weight.grad.zero_()
            lost = True
        for hook in layer.weight_hooks:
            hook()

    def built(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *positional, **named)
        for layer in (each for each in self.decoder.modules() if isinstance(each, kinds)):
            hooks: list[Callable[[], None]] = []
            layer.wgrad_store, layer.weight_hooks = Store(delay), hooks
            layer.weight.skip_backward_post_hook = delay
            layer.register_wgrad_accumulation_and_reduce_hooks = hooks.append
            layer._forward_impl = partial(forward, layer)
            layer.backward_dw = partial(backward_dw, layer)

    def wrapped(self: Any, config: Any, ddp_config: Any, *rest: Any, **named: Any) -> None:
        ddp_config.delay_wgrad_compute = delay
        wrap(self, config, ddp_config, *rest, **named)

    GPTModel.__init__ = built
    DistributedDataParallel.__init__ = wrapped
