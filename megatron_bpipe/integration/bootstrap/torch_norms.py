"""torch's norms with sequence parallelism, where Apex and Transformer Engine are not there.

``WrappedTorchNorm`` refuses because torch's modules do not mark their parameters for the reduction
of gradients over the tensor-parallel group (``core/distributed/finalize_model_grads.py`` looks for
``sequence_parallel``). The norms of Apex and Transformer Engine do, and need CUDA. So mark them
here: for runs on a CPU, and to profile where neither is installed.
"""

from __future__ import annotations

from typing import Any

from megatron_bpipe.integration.checks.hook_points import TORCH_NORM
from megatron_bpipe.integration.patches.import_hook import after_import


def let_torch_norms_have_sequence_parallelism() -> None:
    """Put that in place; before or after Megatron was imported."""
    after_import(TORCH_NORM, _mark_parameters)


def _mark_parameters(torch_norm: Any) -> None:
    wrapped = torch_norm.WrappedTorchNorm
    stock = wrapped.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        sequence_parallel = config.sequence_parallel
        config.sequence_parallel = False
        try:
            norm = stock(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    wrapped.__new__ = staticmethod(new)
