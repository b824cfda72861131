"""Weight gradients apart from the rest of the backward: B leaves them, W computes them.

    F   each linear layer runs as it is, told to defer its weight gradient (Megatron's own means for
        the last layer, ``grad_output_buffer``), and a node after it keeps the layer's input
    B   that node is passed first: input and output gradient go into the queue of the activation;
        then Megatron's own code computes the input's gradient
    W   the queue is worked off: with gradient-accumulation fusion by the fused kernel into
        ``main_grad``, else by the same product as in stock, which autograd accumulates as it would
        have in B, hooks of the parameter included

Every product has the same operands in the same order as in stock, and a weight's gradients are
added in the order of the micro-batches, as W comes in the order of B: bitwise stock.

Transformer Engine's layers put theirs off themselves (`transformer_engine`).

What stays in B: biases, norms, embeddings, the router; and a linear layer whose input needs no
gradient. With sequence parallelism the local shard of the input waits, and is gathered again at W:
the buffer into which Megatron gathers is shared by all layers.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bpipe.integration.checks.hook_points import LAYERS
from megatron_bpipe.integration.patches.split_backward.transformer_engine import (
    compute_oldest,
    delayed_layers,
)
from megatron_bpipe.schedule.ops import ActivationKey

KERNELS = "fused_weight_gradient_mlp_cuda"
_DISCARD: deque[torch.Tensor] = deque(maxlen=0)  # a grad_output_buffer that keeps nothing


@dataclass(slots=True)
class _Layer:
    """One call of a linear layer: what W needs beside the input and the output's gradient."""

    weight: torch.Tensor
    fused: bool
    gathers: bool
    group: Any


_Waiting = tuple[_Layer, torch.Tensor, torch.Tensor]  # layer, its local input, its output gradient


@dataclass
class WeightGradients:
    """The weight gradients of one stage that wait for their W, by activation.

    Args:
        chunks: the stage's model chunks.
        on_left: told after each B which tensors wait for its W, for the memory books.
    """

    chunks: Sequence[torch.nn.Module]
    on_left: Callable[[ActivationKey, list[torch.Tensor]], None] | None = None
    _waiting: dict[ActivationKey, list[_Waiting]] = field(default_factory=dict)
    _current: list[_Waiting] | None = None
    _delayed: list[list[Any]] = field(default_factory=list)  # by Transformer Engine, by chunk

    def __post_init__(self) -> None:
        self._delayed = [delayed_layers(chunk) for chunk in self.chunks]

    @contextmanager
    def left_by(self, key: ActivationKey) -> Iterator[None]:
        """Around the B of an activation: its weight gradients wait from here on."""
        self._current = self._waiting[key] = []
        try:
            yield
        finally:
            self._current = None
        if self.on_left is not None:
            self.on_left(key, [part for _, *parts in self._waiting[key] for part in parts])

    def compute(self, key: ActivationKey) -> None:
        """W: all that the B of this activation left; frees what was kept for it."""
        waiting = self._waiting.pop(key)
        uses: dict[int, int] = {}
        for layer, _, _ in waiting:
            uses[id(layer.weight)] = uses.get(id(layer.weight), 0) + 1
        sums: dict[int, torch.Tensor] = {}
        waiting.reverse()
        while waiting:
            layer, local_input, gradient = waiting.pop()
            product = _product(layer, local_input, gradient)
            del local_input, gradient
            if product is None:
                continue
            name = id(layer.weight)
            uses[name] -= 1
            if name in sums:  # used twice in one forward: autograd would have added them up first
                product = sums.pop(name) + product
            if uses[name]:
                sums[name] = product
            else:
                torch.autograd.backward(layer.weight, product)
        compute_oldest(self._delayed[key.chunk])

    def add(self, layer: _Layer, local_input: torch.Tensor, gradient: torch.Tensor) -> None:
        """B has passed a layer."""
        assert self._current is not None
        self._current.append((layer, local_input, gradient))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Around an iteration: what Megatron's linear layers compute leaves its W to the queue."""
        linear_layers: Any = importlib.import_module(LAYERS)
        stock = linear_layers.linear_with_grad_accumulation_and_async_allreduce
        linear_layers.linear_with_grad_accumulation_and_async_allreduce = self._wrapped(stock)
        try:
            yield
        finally:
            linear_layers.linear_with_grad_accumulation_and_async_allreduce = stock

    def _wrapped(self, stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def linear(
            input: torch.Tensor,  # Megatron's names: it passes them by keyword
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            gradient_accumulation_fusion: bool,
            *positional: Any,
            **named: Any,
        ) -> torch.Tensor:
            if not (torch.is_grad_enabled() and input.requires_grad):
                return stock(
                    input, weight, bias, gradient_accumulation_fusion, *positional, **named
                )
            named.update(grad_output_buffer=_DISCARD, wgrad_deferral_limit=0)
            # as if fused: only then Megatron can leave the product out of its backward
            output = stock(input, weight.detach(), None, True, *positional, **named)
            layer = _Layer(
                weight,
                gradient_accumulation_fusion,
                named["sequence_parallel"],
                named.get("tp_group"),
            )
            deferred: torch.Tensor = _Deferred.apply(output, input, bias, layer, self)
            return deferred

        linear.__dict__.update(vars(stock))  # Megatron keeps a mark on its function
        return linear


class _Deferred(torch.autograd.Function):
    """Adds the bias to a linear layer's output; in B hands the layer to the queue."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        local_input: torch.Tensor,
        bias: torch.Tensor | None,
        layer: _Layer,
        queue: WeightGradients,
    ) -> torch.Tensor:
        ctx.save_for_backward(local_input)
        ctx.layer, ctx.queue, ctx.has_bias = layer, queue, bias is not None
        return output + bias if bias is not None else output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (local_input,) = ctx.saved_tensors
        gradient = gradient.to(local_input.dtype)  # logits may be wider, as main's output_dtype
        ctx.queue.add(ctx.layer, local_input.detach(), gradient)
        bias_gradient = None
        if ctx.has_bias:
            bias_gradient = gradient.contiguous().view(-1, gradient.shape[-1]).sum(dim=0)
        return gradient, None, bias_gradient, None, None


@torch.no_grad()
def _product(
    layer: _Layer, local_input: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor | None:
    """A weight's gradient of one micro-batch; None where it has gone into ``main_grad``."""
    linear_layers: Any = importlib.import_module(LAYERS)
    total = local_input
    if layer.gathers:
        total = linear_layers.gather_from_sequence_parallel_region(local_input, group=layer.group)
    gradient, total = linear_layers.prepare_input_tensors_for_wgrad_compute(gradient, total)
    if not layer.fused:
        return gradient.t().matmul(total)
    weight: Any = layer.weight
    kernels = vars(linear_layers)[KERNELS]  # Megatron has it where apex is installed
    single = weight.main_grad.dtype == torch.float32
    accumulate = kernels.wgrad_gemm_accum_fp32 if single else kernels.wgrad_gemm_accum_fp16
    accumulate(total, gradient, weight.main_grad)
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
    return None
