"""Weight gradients that wait for W: Transformer Engine's, by a stand-in, and Megatron's own.

Transformer Engine needs a GPU. The stand-in has what W uses of it: a layer's ``wgrad_store``, which
says whether it delays, and ``backward_dw``, which computes the oldest entry of its queue.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bpipe.integration.patches.split_backward.transformer_engine import (
    without_combined_1f1b,
)
from megatron_bpipe.integration.patches.split_backward.weight_gradients import WeightGradients
from megatron_bpipe.schedule.ops import ActivationKey


class Store:
    """As transformer_engine.pytorch.module._common.WeightGradStore."""

    def __init__(self, delay: bool) -> None:
        self.delay, self.queue = delay, deque[Any]()

    def delay_wgrad_compute(self) -> bool:
        return self.delay


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.layer.wgrad_store.queue.append((ctx.saved_tensors[0], gradient))
        return gradient @ ctx.layer.weight, None


class Delayed(torch.nn.Module):
    """A linear layer whose weight gradient waits."""

    def __init__(self, order: list[str], name: str, delay: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.wgrad_store, self.order, self.name = Store(delay), order, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(x, self)

    def backward_dw(self) -> None:
        self.order.append(self.name)
        x, gradient = self.wgrad_store.queue.popleft()
        torch.autograd.backward(self.weight, gradient.t() @ x)


def chunk(order: list[str], *names: str) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Delayed(order, name) for name in names))


def plain(model: torch.nn.Sequential, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same gradients without delay, micro-batch after micro-batch."""
    weights = [layer.weight.detach().clone().requires_grad_() for layer in model]
    for x in inputs:
        for weight in weights:
            x = x @ weight.t()
        x.sum().backward()
    return [weight.grad for weight in weights]


def test_transformer_engines_layers_wait_for_w() -> None:
    order: list[str] = []
    model = chunk(order, "first", "second")
    weights = WeightGradients([model])
    inputs = [torch.randn(4, 8) for _ in range(3)]
    keys = [ActivationKey(n) for n in range(3)]
    outputs = [model(x.clone().requires_grad_()) for x in inputs]
    for key, output in zip(keys, outputs, strict=True):
        with weights.left_by(key):
            output.sum().backward()
    assert all(layer.weight.grad is None for layer in model)
    weights.compute(keys[0])
    assert order == ["second", "first"]  # as a backward would
    for key in keys[1:]:
        weights.compute(key)
    for layer, wanted in zip(model, plain(model, inputs), strict=True):
        assert torch.equal(layer.weight.grad, wanted)
        assert not layer.wgrad_store.queue


def test_w_is_of_its_own_chunk() -> None:
    order: list[str] = []
    models = [chunk(order, "a"), chunk(order, "b")]
    weights = WeightGradients(models)
    for number, model in enumerate(models):
        with weights.left_by(ActivationKey(0, number)):
            model(torch.randn(4, 8).requires_grad_()).sum().backward()
    weights.compute(ActivationKey(0, 1))
    assert order == ["b"]


def test_a_layer_built_without_is_refused() -> None:
    model = torch.nn.Sequential(Delayed([], "x", delay=False))
    with pytest.raises(ValueError, match="layer 0 of Transformer Engine was built"):
        WeightGradients([model])


def test_a_layer_that_megatron_builds_without_has_its_weight_gradient_in_b() -> None:
    """The MXFP8 head, whatever the configuration says."""
    order: list[str] = []
    model = torch.nn.Sequential(Delayed(order, "body"), Delayed(order, "head", delay=False))
    model.config = SimpleNamespace(delay_wgrad_compute=True)
    weights = WeightGradients([model])
    with weights.left_by(ActivationKey(0)):
        model[0](torch.randn(4, 8).requires_grad_()).sum().backward()
    weights.compute(ActivationKey(0))
    assert order == ["body"]


def test_the_configuration_takes_the_setting() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    with pytest.raises(AssertionError, match="overlap_moe_expert_parallel_comm"):
        TransformerConfig(**sizes, delay_wgrad_compute=True)
    stock = TransformerConfig.__post_init__
    TransformerConfig.__post_init__ = without_combined_1f1b(stock)
    try:
        assert TransformerConfig(**sizes, delay_wgrad_compute=True).delay_wgrad_compute
        assert not TransformerConfig(**sizes).delay_wgrad_compute
    finally:
        TransformerConfig.__post_init__ = stock


def test_used_twice_in_one_forward_is_added_up_first() -> None:
    """Autograd adds what one backward makes before it adds that to what was there."""
    from megatron.core.tensor_parallel import layers

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    weight.grad = torch.full_like(weight, 1e-3)
    other = weight.detach().clone().requires_grad_()
    other.grad = weight.grad.clone()
    x = torch.randn(4, 8)
    weights = WeightGradients([torch.nn.Identity()])
    with weights.deferred():
        linear = layers.linear_with_grad_accumulation_and_async_allreduce
        named = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}
        output = x.clone().requires_grad_()
        for _ in range(2):
            output = linear(output, weight, None, gradient_accumulation_fusion=False, **named)
    (x @ other.t() @ other.t()).sum().backward()
    key = ActivationKey(0)
    with weights.left_by(key):
        output.sum().backward()
    weights.compute(key)
    assert torch.equal(weight.grad, other.grad)


def test_a_gradient_wider_than_the_layer_is_rounded_first() -> None:
    """As Megatron's main does for logits in fp32 (``output_dtype``) of a layer in bf16."""
    from megatron.core.tensor_parallel import layers

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    wide = torch.randn(4, 8)
    weights = WeightGradients([torch.nn.Identity()])
    stock = layers.linear_with_grad_accumulation_and_async_allreduce
    named = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}

    def mixed(*positional: Any, **given: Any) -> torch.Tensor:
        return stock(*positional, **given).float()

    mixed.warned = True  # type: ignore[attr-defined]
    linear = weights._wrapped(mixed)
    output = linear(x.requires_grad_(), weight, None, gradient_accumulation_fusion=False, **named)
    key = ActivationKey(0)
    with weights.left_by(key):
        output.backward(wide)
    weights.compute(key)
    assert torch.equal(weight.grad, wide.bfloat16().t() @ x.detach())
