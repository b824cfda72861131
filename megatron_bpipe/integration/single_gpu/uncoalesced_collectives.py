"""Coalesced collectives one by one, for a rehearsal: gloo has them for host memory only.

Megatron reduces gradients inside ``torch.distributed._coalescing_manager``, which hands all tensors
to one call of the process group (``allreduce_coalesced`` and the like). For CUDA tensors gloo
refuses that call, but not the single ones, which come to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class _All:
    """Several collectives under way."""

    works: list[Any]

    def wait(self) -> None:
        """Return when all are over."""
        for work in self.works:
            work.wait()


def _reduce(group: Any, tensors: Sequence[torch.Tensor], options: Any) -> _All:
    single = dist.AllreduceOptions()
    single.reduceOp = options.reduceOp
    return _All([group.allreduce([tensor], single) for tensor in tensors])


def _gather(
    group: Any,
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    options: Any = None,  # older releases of torch give none
) -> _All:
    pairs = zip(outputs, inputs, strict=True)
    return _All([group._allgather_base(output, given) for output, given in pairs])


def _scatter(
    group: Any, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], options: Any
) -> _All:
    pairs = zip(outputs, inputs, strict=True)
    return _All([group._reduce_scatter_base(output, given, options) for output, given in pairs])


REPLACEMENTS: dict[str, Callable[..., _All]] = {
    "allreduce_coalesced": _reduce,
    "allgather_into_tensor_coalesced": _gather,
    "all_gather_single_coalesced": _gather,  # its name in newer releases of torch
    "reduce_scatter_tensor_coalesced": _scatter,
    "reduce_scatter_single_coalesced": _scatter,
}
"""What takes the place of methods of ``torch.distributed.ProcessGroup``, where they exist."""
