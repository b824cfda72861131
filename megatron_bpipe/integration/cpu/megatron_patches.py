"""The places where Megatron itself, not ``torch.cuda``, insists on a GPU.

Each is changed when its module is imported (see ``integration/patches/import_hook.py``).
"""

import functools
from typing import Any

import torch

from megatron_bpipe.integration.bootstrap.torch_norms import (
    let_torch_norms_have_sequence_parallelism,
)
from megatron_bpipe.integration.checks.hook_points import (
    ARGUMENTS,
    FUSED_KERNELS,
    INITIALIZE,
    MOE_UTILS,
)
from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.patches.import_hook import after_import


def install() -> None:
    """Register the patches for the modules they concern."""
    after_import(ARGUMENTS, _refuse_gpu_only)
    after_import(INITIALIZE, _allow_no_cuda)
    after_import(FUSED_KERNELS, _no_kernels)
    let_torch_norms_have_sequence_parallelism()
    after_import(MOE_UTILS, _splits_as_numbers)


def _refuse_gpu_only(arguments: Any) -> None:
    """End a run that asks for what only a GPU has, before NCCL or an import fails.

    The defaults are those of the CPU (``defaults.py``); a command line made for a GPU
    may say otherwise.
    """
    stock = arguments.validate_args

    @functools.wraps(stock)
    def validate_args(args: Any, *rest: Any, **named: Any) -> Any:
        for flag, value, on_cpu in (
            ("--distributed-backend", args.distributed_backend, "gloo"),
            ("--transformer-impl", args.transformer_impl, "local"),
        ):
            if value != on_cpu:
                abort(
                    f"{flag} {value} needs a GPU, and there is none: "
                    f"leave the flag out, or give {on_cpu}"
                )
        return stock(args, *rest, **named)

    arguments.validate_args = validate_args


def _allow_no_cuda(initialize: Any) -> None:
    """Pass ``allow_no_cuda``: ``training/training.py``, ``pretrain``, does not."""
    initialize.initialize_megatron = functools.partial(
        initialize.initialize_megatron, allow_no_cuda=True
    )


def _no_kernels(fused_kernels: Any) -> None:
    """Compile no CUDA kernels: checkouts up to 0.16 do, in ``_compile_dependencies``."""
    fused_kernels.load = lambda args: None


def _splits_as_numbers(moe_utils: Any) -> None:
    """Hand the sizes of an all-to-all over as numbers, as from a GPU.

    ``maybe_move_tensor_to_cpu(..., as_numpy=True)`` leaves tensors that are on the CPU
    as they are, and the collective then refuses them
    (``core/transformer/moe/token_dispatcher.py``).
    """
    stock = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(stock)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, **named: Any) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return stock(tensor, as_numpy=as_numpy, **named)

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
