"""How a run is executed, beside its sizes: recomputation, overlaps, fused kernels.

Each field is one of Megatron's flags; the defaults are what the planner's command asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bpipe.estimate.errors import EstimateError

MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "mla_up_proj", "shared_experts")
"""What --recompute-modules takes and is known here (megatron/core/transformer/
transformer_config.py, core_v0.14.0 to 0.19.0)."""


@dataclass(frozen=True)
class Recompute:
    """What is recomputed in the backward.

    ``method`` "uniform": every ``layers`` layers keep one input; "block": the first ``layers``
    layers of each chunk keep their inputs only, the others everything; None: no whole layers.
    ``modules`` are parts of every layer (--recompute-granularity selective).

    Raises EstimateError for a module that is not known, and for both ways at once.
    """

    method: Literal["uniform", "block"] | None = None
    layers: int = 1
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.modules:
            if name not in MODULES:
                raise EstimateError(
                    f"--recompute-modules {name}: the planner knows {', '.join(MODULES)}"
                )
        if self.method and self.modules:
            raise EstimateError(
                f"recompute whole layers ({self.method}) and {', '.join(self.modules)}: use one"
            )
        if self.layers < 0:
            raise EstimateError(f"--recompute-num-layers is {self.layers}: give 0 or more")

    @property
    def active(self) -> bool:
        """Whether anything is recomputed."""
        return bool(self.modules) or (self.method is not None and self.layers > 0)


@dataclass(frozen=True)
class Settings:
    """Overlaps and kernels of a run.

    ``grad_overlap``, ``param_overlap``: data-parallel reduce and gather beside computing;
    ``tp_overlap``: messages of tensor parallelism split and run beside the matrix products;
    ``grad_fusion``: gradients of weights accumulated inside the matrix product;
    ``loss_fusion``: cross entropy in one kernel; ``scatter_messages``: what a stage sends is split
    over its tensor-parallel ranks and gathered on the other side, as Megatron did before sequence
    parallelism (2104.04473, section 4.1); ``deterministic``: kernels without atomic additions;
    ``placement``: what --bpipe-placement asks for, None: nothing.
    """

    grad_overlap: bool = True
    param_overlap: bool = True
    tp_overlap: bool = False
    grad_fusion: bool = True
    loss_fusion: bool = False
    scatter_messages: bool = False
    deterministic: bool = False
    placement: str | None = None


DEFAULT = Settings()
