"""Layers that keep their activations the way Transformer Engine's do, computed on a CPU.

    quantised tensors    wrapper subclasses without memory of their own, around plain tensors
    prepare_for_saving   takes the plain tensors out of them, so that autograd saves those
    a backward           puts them back, and empties what it has used: ``tensor.data = empty``
    attributes on ctx    tensors that autograd does not see
    a weight's cache     quantised once, saved by every micro-batch

After transformer_engine/pytorch/quantized_tensor.py, module/linear.py and utils.clear_tensor_data.
"""

from __future__ import annotations

from typing import Any

import torch

LEVELS = 127.0


class Quantised(torch.Tensor):
    """A tensor kept as 8-bit integers and a scale; has a shape, but no memory of its own."""

    integers: torch.Tensor | None
    scale: torch.Tensor | None

    @staticmethod
    def __new__(cls, integers: torch.Tensor, scale: torch.Tensor) -> Quantised:
        """Wrap both."""
        return torch.Tensor._make_wrapper_subclass(
            cls, integers.shape, dtype=scale.dtype, device=integers.device
        )

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor) -> None:
        self.integers, self.scale = integers, scale

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Quantised:
        """``tensor`` in 8 bits."""
        scale = tensor.detach().abs().max() / LEVELS + 1e-12
        return cls((tensor.detach() / scale).round().to(torch.int8), scale)

    def plain(self) -> torch.Tensor:
        """Its values."""
        assert self.integers is not None
        assert self.scale is not None
        return self.integers.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with the values."""
        plain = [a.plain() if isinstance(a, Quantised) else a for a in args]
        return function(*plain, **(kwargs or {}))

    def prepare_for_saving(self) -> tuple[list[torch.Tensor | None], Quantised]:
        """Its plain tensors, and itself without them."""
        plain = [self.integers, self.scale]
        self.integers = self.scale = None
        return plain, self

    def restore_from_saved(self, saved: list[Any]) -> list[Any]:
        """Take its plain tensors back; returns what is left."""
        self.integers, self.scale, *rest = saved
        return rest


def prepare_for_saving(*tensors: Any) -> tuple[list[Any], list[Any]]:
    """What autograd is to save, and what puts it together again."""
    saved: list[Any] = []
    objects: list[Any] = []
    for tensor in tensors:
        if isinstance(tensor, Quantised):
            plain, rest = tensor.prepare_for_saving()
            saved += plain
            objects.append(rest)
        else:
            saved.append(tensor)
            objects.append(None)
    return saved, objects


def restore_from_saved(objects: list[Any], saved: Any) -> list[Any]:
    """The tensors given to `prepare_for_saving`."""
    left, tensors = list(saved), []
    for one in objects:
        if one is None:
            tensors.append(left.pop(0))
        else:
            left = one.restore_from_saved(left)
            tensors.append(one)
    return tensors


def clear(tensor: torch.Tensor) -> None:
    """Give a tensor's memory back, whoever holds the tensor."""
    if isinstance(tensor, Quantised):
        tensor.integers = tensor.scale = None
    else:
        tensor.data = torch.Tensor()


class LinearFunction(torch.autograd.Function):
    """A matrix product of a quantised input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, cached: Quantised) -> torch.Tensor:
        """Save the input in 8 bits, and the weight's cache."""
        quantised = Quantised.of(x)
        out = quantised.plain() @ cached.plain().t()
        ctx.row_sums = x.detach().sum(0)  # an attribute: autograd does not see it
        # a copy of the cache's wrapper: taking its tensors out must not empty the cache itself
        cached = Quantised(cached.integers, cached.scale)
        saved, ctx.objects = prepare_for_saving(quantised, cached, weight)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Use what was saved, then empty it."""
        quantised, cached, weight = restore_from_saved(ctx.objects, ctx.saved_tensors)
        ctx.objects = None
        of_input = gradient @ cached.plain()
        of_weight = gradient.t() @ quantised.plain() + 0 * ctx.row_sums
        clear(quantised)
        return of_input, of_weight.to(weight.dtype), None


class GeluFunction(torch.autograd.Function):
    """An activation function that empties its input in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Save the input."""
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Use it, then empty it."""
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            torch.nn.functional.gelu(again).backward(gradient)
        found = again.grad
        clear(x)
        return found


class Mlp(torch.nn.Module):
    """Norm, two quantised products with an activation function between, and the residual."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden)
        self.up = torch.nn.Parameter(torch.randn(4 * hidden, hidden) / hidden)
        self.down = torch.nn.Parameter(torch.randn(hidden, 4 * hidden) / hidden)
        self._cache: list[Quantised] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape as given: tokens, hidden."""
        if not self._cache:  # the first micro-batch of an iteration
            self._cache = [Quantised.of(self.up), Quantised.of(self.down)]
        up, down = self._cache
        wide = LinearFunction.apply(self.norm(x), self.up, up)
        return x + LinearFunction.apply(GeluFunction.apply(wide), self.down, down)
