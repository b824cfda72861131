"""What crosses between nodes under a placement: pairs, pipeline edges, and the groups' rings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_bpipe.placement.nodes import check_node_size
from megatron_bpipe.placement.pair_adjacent import Placement, slot_of_rank
from megatron_bpipe.placement.shape import ParallelShape, PlacementError
from megatron_bpipe.schedule.ops import partner


@dataclass(frozen=True)
class Count:
    """How many of ``total`` things cross between nodes."""

    across_nodes: int
    total: int

    def __str__(self) -> str:
        return f"{self.across_nodes} of {self.total}"


@dataclass(frozen=True)
class Traffic:
    """Traffic that leaves its node.

    A pair and a pipeline edge are counted once for each two ranks that exchange data (so t times
    for a stage of t ranks); a group is counted when its ranks are not all on one node and only
    groups of two or more ranks count.  ``dp_rings`` are the groups over which the gradients of
    dense layers are reduced (dp x cp).
    """

    pairs: Count
    pipeline_edges: Count
    dp_rings: Count
    cp_rings: Count
    ep_groups: Count
    tp_groups: Count


def count_traffic(shape: ParallelShape, placement: Placement, gpus_per_node: int) -> Traffic:
    """Count what crosses between nodes.

    Raises PlacementError when the placement is not a permutation of this job's ranks, or the nodes
    are not filled.
    """
    check_node_size(shape, gpus_per_node)
    check_placement(shape, placement)
    node = [slot // gpus_per_node for slot in slot_of_rank(placement)]
    pipelines = shape.groups("pp")
    return Traffic(
        pairs=_spanning(
            (
                (line[stage], line[other])
                for line in pipelines
                for stage in range(shape.pp // 2)
                if (other := partner(stage, shape.pp)) is not None
            ),
            node,
        ),
        pipeline_edges=_spanning(
            (edge for line in pipelines for edge in itertools.pairwise(line)), node
        ),
        dp_rings=_spanning(shape.groups("dp-cp"), node),
        cp_rings=_spanning(shape.groups("cp"), node),
        ep_groups=_spanning(shape.groups("ep"), node),
        tp_groups=_spanning(shape.groups("tp"), node),
    )


def check_placement(shape: ParallelShape, placement: Placement) -> None:
    """Raise PlacementError unless the placement names each rank of this job exactly once."""
    if len(placement) != shape.world:
        raise PlacementError(
            f"the placement is for a job of {len(placement)} ranks, this one has {shape.world}: "
            "compute it anew for these sizes"
        )
    missing = sorted(set(range(shape.world)) - set(placement))
    if missing:
        raise PlacementError(
            f"the placement does not name rank {missing[0]} ({len(missing)} missing in all): every "
            f"rank from 0 to {shape.world - 1} must be named once"
        )


def _spanning(groups: Iterable[Sequence[int]], node: Sequence[int]) -> Count:
    spans = [len({node[rank] for rank in group}) > 1 for group in groups if len(group) > 1]
    return Count(sum(spans), len(spans))
