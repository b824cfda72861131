"""Recompute another number of layers on each stage (``--bpipe-recompute``).

Megatron's flag has one number for all stages, but every rank has a `TransformerConfig` of its own,
and a transformer block asks it at each forward, from release 0.14 to 0.19, how many of its layers
to recompute.  So the first iteration begins with this stage's number in it; nothing is replaced.
"""

from __future__ import annotations

from typing import Any


def recompute_on_this_stage(config: Any, layers: int) -> None:
    """Let a block keep only the inputs of its first ``layers`` layers.

    Args:
        config: Megatron's TransformerConfig of this rank's model.
        layers: of each model chunk; 0: nothing is recomputed.
    """
    if layers:
        config.recompute_granularity = "full"
        config.recompute_method = "block"
        config.recompute_num_layers = layers
