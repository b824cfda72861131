"""Where tensors live: every ``cuda`` device becomes the CPU.

Megatron places tensors in four ways: ``device=torch.cuda.current_device()``
(``core/pipeline_parallel/p2p_communication.py`` and most others), the literal
``device="cuda"`` in factory functions (``core/pipeline_parallel/schedules.py``,
``core/optimizer``, ``training/training.py``), ``Tensor.cuda()`` and
``Tensor.to("cuda")``. And it reads the placement back from ``Tensor.type()``
(``core/optimizer/optimizer.py`` sorts parameters by "torch.cuda.FloatTensor").
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_bpipe.integration.cpu.replace import replace

CPU = torch.device("cpu")

FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
"""The functions of torch with a ``device`` argument that training code calls."""

METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
"""The same among the methods of a tensor."""


def names_cuda(device: object) -> bool:
    """Tell whether an argument means a CUDA device: "cuda", "cuda:1" or the object."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and (device == "cuda" or device.startswith("cuda:"))


def on_cpu(device: object) -> object:
    """Return the CPU for a CUDA device, anything else unchanged."""
    return CPU if names_cuda(device) else device


def _factory(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory: ``device`` on the CPU, and nothing pinned (pinning needs CUDA)."""

    @functools.wraps(stock)
    def create(*args: Any, **kwargs: Any) -> Any:
        if names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return stock(*args, **kwargs)

    return create


def _tensor_to(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``Tensor.to``: the device comes first or by keyword."""

    @functools.wraps(stock)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and names_cuda(args[0]):
            args = (CPU, *args[1:])
        if names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return stock(self, *args, **kwargs)

    return to


def _tensor_type(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Tensor.type``: read, it says torch.cuda.*; set, it takes torch.cuda.*."""

    @functools.wraps(stock)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return stock(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return stock(self, dtype, *args, **kwargs)

    return type_


def _itself(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Stand in for ``Tensor.cuda`` and ``pin_memory``: it is there already."""
    return self


def _properties(device: object = None) -> SimpleNamespace:
    """Stand in for ``get_device_properties``: no CUDA architecture is claimed."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=pages * size,
        multi_processor_count=os.cpu_count() or 1,
    )


class NoDeviceSwitch:
    """Stand in for the context manager ``torch.cuda.device``: there is but one."""

    def __init__(self, device: object = None) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def install() -> None:
    """Put the CPU in the place of every CUDA device."""
    # torch lists its factories once, for ``with torch.device(...)``: it must see its own.
    _device_constructors()
    for name in FACTORIES:
        replace(torch, **{name: _factory(getattr(torch, name))})
    for name in METHODS:
        replace(torch.Tensor, **{name: _factory(getattr(torch.Tensor, name))})
    replace(
        torch.Tensor,
        cuda=_itself,
        pin_memory=_itself,
        to=_tensor_to(torch.Tensor.to),
        type=_tensor_type(torch.Tensor.type),
    )
    replace(
        torch.cuda,
        _lazy_init=lambda: None,
        current_device=lambda: CPU,
        device=NoDeviceSwitch,
        # With 0 devices Megatron skips initialize_model_parallel without a word
        # (training/initialize.py, _initialize_distributed).
        device_count=lambda: 1,
        get_device_capability=lambda device=None: (0, 0),
        get_device_name=lambda device=None: "cpu",
        get_device_properties=_properties,
        set_device=lambda device: None,
    )
