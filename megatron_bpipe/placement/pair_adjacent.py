"""Which logical rank runs on which GPU so that the two stages of a pair share a node.

A *slot* is a GPU of the job, counted node by node; a placement is the tuple of the logical ranks on
slots 0, 1, 2, ...  What is wanted, the strongest wish first:

1. a tensor-parallel group is never torn apart (it is placed as one *cell*);
2. evictor and acceptor (stages x and p-1-x, same cp and dp coordinates) share a node;
3. pipeline neighbours are close: pairs follow each other in the order of their stages;
4. rank 0 stays on slot 0, where the rendezvous store runs.

Cells are laid out pair by pair, the axes inside ``pp`` in Megatron's order fastest, those outside
it slowest.  So a stage keeps its data-parallel copies on its node while pair and copies fit; where
they are wider than a node, the copies are split over nodes and the pairs stay whole.  A node that
has one cell left over takes a middle stage (odd p), and only where none is left is a pair torn
apart: then no placement with whole tensor-parallel groups tears fewer (a test searches).

Source: the published pair-adjacent assignment, section 2.2 and figure 2 of arXiv 2401.02088.
"""

from __future__ import annotations

from megatron_bpipe.placement.nodes import check_node_size, check_whole_tp_groups
from megatron_bpipe.placement.shape import ParallelShape
from megatron_bpipe.schedule.ops import partner

Placement = tuple[int, ...]
"""Logical rank on each slot."""

_Cell = tuple[int, ...]  # the ranks of one tensor-parallel group
_Block = tuple[_Cell, ...]  # the two cells of a pair, or the one of a middle stage


def megatron_order(shape: ParallelShape, gpus_per_node: int) -> Placement:
    """Every rank on the slot of its own number.

    Raises PlacementError when the nodes are not filled.
    """
    check_node_size(shape, gpus_per_node)
    return tuple(range(shape.world))


def pair_adjacent(shape: ParallelShape, gpus_per_node: int) -> Placement:
    """Logical rank on each slot, pairs on one node wherever whole TP groups allow it.

    Raises PlacementError when the nodes are not filled, or when ``tp`` neither divides a node nor
    fills whole nodes.
    """
    check_node_size(shape, gpus_per_node)
    check_whole_tp_groups(shape, gpus_per_node)
    cells_per_node = gpus_per_node // shape.tp
    blocks = _blocks(shape)
    if cells_per_node < 2:  # no node can hold a pair: partners at least on neighbouring nodes
        cells = [cell for block in blocks for cell in block]
    else:
        cells = _fill(blocks, cells_per_node)
    return tuple(rank for cell in cells for rank in cell)


def slot_of_rank(placement: Placement) -> tuple[int, ...]:
    """The inverse of a placement: the slot on which each logical rank runs."""
    slots = [0] * len(placement)
    for slot, rank in enumerate(placement):
        slots[rank] = slot
    return tuple(slots)


def _blocks(shape: ParallelShape) -> list[_Block]:
    """Pairs and middle stages in the order in which they are laid out."""
    stride = shape.stage_stride
    pipelines: dict[int, list[_Cell]] = {}  # by the axes outside pp: first-stage cells
    for cell in shape.groups("tp"):
        if shape.coordinates(cell[0]).stage == 0:
            pipelines.setdefault(cell[0] // (stride * shape.pp), []).append(cell)

    def at(cell: _Cell, stage: int) -> _Cell:
        return tuple(rank + stage * stride for rank in cell)

    blocks: list[_Block] = []
    for _, first_stage in sorted(pipelines.items()):
        for stage in range((shape.pp + 1) // 2):
            other = partner(stage, shape.pp)
            for cell in sorted(first_stage):
                mine = at(cell, stage)
                blocks.append((mine,) if other is None else (mine, at(cell, other)))
    return blocks


def _fill(blocks: list[_Block], cells_per_node: int) -> list[_Cell]:
    """Lay blocks into nodes of this many cells, tearing a pair only where no single is left."""
    waiting = list(blocks)
    placed: list[_Cell] = []
    while waiting:
        room = cells_per_node - len(placed) % cells_per_node
        index = next((i for i, block in enumerate(waiting) if len(block) <= room), None)
        if index is not None:
            placed.extend(waiting.pop(index))
        else:
            evictor, acceptor = waiting[0]
            placed.append(evictor)
            waiting[0] = (acceptor,)
    return placed
