"""Which GPU each logical rank runs on, so that evictor and acceptor share a node."""

from megatron_bpipe.placement.crossings import Count, Crossings, check_placement, count_crossings
from megatron_bpipe.placement.nodes import common_node_size
from megatron_bpipe.placement.pair_adjacent import (
    Placement,
    megatron_order,
    pair_adjacent,
    slot_of_rank,
)
from megatron_bpipe.placement.picture import picture_text
from megatron_bpipe.placement.report import (
    PLACEMENTS,
    Report,
    as_data,
    crossings_text,
    make_report,
    table_text,
)
from megatron_bpipe.placement.shape import DEFAULT_ORDER, Coordinates, ParallelShape, PlacementError
from megatron_bpipe.placement.svg import picture_svg

__all__ = [
    "DEFAULT_ORDER",
    "PLACEMENTS",
    "Coordinates",
    "Count",
    "Crossings",
    "ParallelShape",
    "Placement",
    "PlacementError",
    "Report",
    "as_data",
    "check_placement",
    "common_node_size",
    "count_crossings",
    "crossings_text",
    "make_report",
    "megatron_order",
    "pair_adjacent",
    "picture_svg",
    "picture_text",
    "slot_of_rank",
    "table_text",
]
