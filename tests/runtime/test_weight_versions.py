"""Versions of the weights: what is saved stays what it was, with as few buffers as possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_bpipe.runtime.weight_versions import WeightVersions


class Saves(torch.autograd.Function):
    """Saves the Parameter itself and a view of it, as Megatron's layers and torch's do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, weight.t())
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, transposed = ctx.saved_tensors
        assert torch.equal(weight.t(), transposed)
        return gradients[0] @ transposed, x.t() @ gradients[0]


def delayed_by_hand(steps: int, lag: int, x: torch.Tensor) -> list[torch.Tensor]:
    """Weights after each step of SGD on sum((x w)^2), gradients at the weights ``lag`` old."""
    history = [torch.eye(3)]
    for t in range(steps):
        old = history[max(0, t - lag)].clone().requires_grad_()
        (x @ old).square().sum().backward()
        assert old.grad is not None
        history.append(history[-1] - 0.01 * old.grad)
    return history[1:]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_gradients_are_those_of_the_version_of_the_forward(lag: int) -> None:
    """Forwards run ``lag`` iterations ahead, as PipeDream's first stages have them."""
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    weight = torch.nn.Parameter(torch.eye(3))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    versions = WeightVersions([weight])
    steps, ahead = 8, []
    reference = delayed_by_hand(steps, lag, x)
    for t in range(steps):
        versions.begin(t)
        while len(ahead) <= lag:  # the first call fills the pipeline
            versions.use(versions.newest)
            ahead.append((versions.newest, Saves.apply(x, weight).square().sum()))
        version, loss = ahead.pop(0)
        assert version == max(0, t - lag)
        versions.use(version)
        optimizer.zero_grad()
        loss.backward()
        versions.advance(max(0, t + 1 - lag))
        optimizer.step()
        assert torch.allclose(weight, reference[t], rtol=1e-6, atol=1e-6)
        assert len(versions.storages()) <= lag + 1
    assert len(versions.storages()) == lag + 1
    without = delayed_by_hand(steps, 0, x)[-1]
    assert torch.allclose(weight, without, rtol=1e-6, atol=1e-6) == (lag == 0)


def test_after_a_flush_the_newest_is_all_there_is() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    versions = WeightVersions([weight])
    versions.begin(0)
    versions.advance(0)
    with torch.no_grad():
        weight.add_(1)
    versions.begin(1)
    versions.use(0)
    assert weight.tolist() == [0, 0]
    versions.forget()
    assert weight.tolist() == [1, 1]
    before = versions.storages()
    versions.begin(0)
    versions.use(0)
    assert weight.tolist() == [1, 1]
    versions.advance(0)
    assert versions.storages() == before  # the buffer of before is used again
    assert versions.bytes_of_one == 8
