"""What is asked of the nodes: equal size, and room for whole tensor-parallel groups."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.placement.shape import ParallelShape, PlacementError


def check_node_size(shape: ParallelShape, gpus_per_node: int) -> None:
    """Raise PlacementError unless the job fills nodes of this many GPUs completely."""
    if gpus_per_node < 1:
        raise PlacementError(f"{gpus_per_node} GPUs per node: give a number of at least 1")
    if shape.world % gpus_per_node:
        fitting = max(n for n in range(1, gpus_per_node + 1) if shape.world % n == 0)
        raise PlacementError(
            f"{gpus_per_node} GPUs per node do not divide a job of {shape.world} ranks: give the "
            f"number of ranks started on each node (for example {fitting}), or change dp so that "
            "the nodes are filled"
        )


def check_whole_tp_groups(shape: ParallelShape, gpus_per_node: int) -> None:
    """Raise PlacementError where nodes cannot hold whole tensor-parallel groups.

    A TP group must fill an equal part of a node, or a whole number of nodes.
    """
    if gpus_per_node % shape.tp and shape.tp % gpus_per_node:
        fitting = [t for t in range(1, gpus_per_node + 1) if gpus_per_node % t == 0]
        raise PlacementError(
            f"tp {shape.tp} does not divide {gpus_per_node} GPUs per node: tensor-parallel groups "
            f"would straddle nodes; choose tp from {', '.join(map(str, fitting))}, or the "
            "placement 'megatron', which leaves the ranks where they are"
        )


def common_node_size(ranks_on_each_node: Sequence[int]) -> int:
    """The GPUs per node of a job, given how many ranks each node has.

    Raises PlacementError when there is no node or the nodes are not all of one size.
    """
    sizes = sorted(set(ranks_on_each_node))
    if not sizes:
        raise PlacementError("no nodes were given: give the number of ranks on each node")
    if len(sizes) > 1:
        raise PlacementError(
            f"the nodes have {' and '.join(map(str, sizes))} ranks: pair-adjacent placement needs "
            "nodes of one size; start the same number of ranks on each node, or use the placement "
            "'megatron'"
        )
    return sizes[0]
