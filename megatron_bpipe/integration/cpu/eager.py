"""``torch.compile`` leaves functions as they are.

Megatron compiles its fused functions when they are defined (``core/jit.py``). Each
process of a CPU run would start a compiler of its own and wait for it.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_bpipe.integration.cpu.replace import replace


def _compile(model: Callable[..., Any] | None = None, **options: object) -> Any:
    """Stand in for ``torch.compile``, called with a function or as a decorator."""
    return (lambda function: function) if model is None else model


def install() -> None:
    """Run everything eagerly."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    replace(torch, compile=_compile)
