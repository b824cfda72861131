"""Weight gradients that Transformer Engine's own layers put off: ``delay_wgrad_compute``.

A layer that was built with it keeps what the weight gradient needs in a queue of its own
(``wgrad_store``) and computes the oldest entry when ``backward_dw`` is called; Megatron registers
its gradient accumulation there. W asks each layer of the chunk for one, in the order of a backward.

Megatron allows the setting only together with its combined 1F1B, which is another schedule: its
configuration's check is told that it is off, and the layers that it is on.

Read in Transformer Engine 2.x and in Megatron; tried with a stand-in only, as it needs a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


def delayed_layers(chunk: torch.nn.Module) -> list[Any]:
    """The layers of a model chunk that put their weight gradients off, in a backward's order.

    Where the configuration asked for it, a layer that does not (Megatron's MXFP8 head) was meant
    so, and has its weight gradient in B.

    Raises:
        ValueError: a layer could, but the configuration did not ask.
    """
    asked = getattr(getattr(chunk, "config", None), "delay_wgrad_compute", False)
    found: list[Any] = []
    for name, module in chunk.named_modules():
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if not trained or not hasattr(module, "wgrad_store"):
            continue
        if module.wgrad_store.delay_wgrad_compute():
            found.append(module)
        elif not asked:
            raise ValueError(
                f"bpipe: layer {name} of Transformer Engine was built with weight gradients in "
                "B; set delay_wgrad_compute of the configuration before the model is built"
            )
    return found[::-1]


def compute_oldest(layers: Sequence[Any]) -> None:
    """W of the activation whose B was the earliest: one weight gradient of each layer."""
    for layer in layers:
        layer.backward_dw()


def without_combined_1f1b(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """``TransformerConfig.__post_init__`` that takes delayed weight gradients as they are."""

    @functools.wraps(post_init)
    def checked(config: Any) -> None:
        delayed, config.delay_wgrad_compute = config.delay_wgrad_compute, False
        post_init(config)
        config.delay_wgrad_compute = delayed

    return checked
