"""Which GPU each logical rank runs on, so that evictor and acceptor share a node."""

from megatron_bpipe.placement.inter_node_traffic import (
    Count,
    Traffic,
    check_placement,
    count_traffic,
)
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
    make_report,
    table_text,
    traffic_text,
)
from megatron_bpipe.placement.shape import DEFAULT_ORDER, Coordinates, ParallelShape, PlacementError
from megatron_bpipe.placement.svg import picture_svg

__all__ = [
    "DEFAULT_ORDER",
    "PLACEMENTS",
    "Coordinates",
    "Count",
    "ParallelShape",
    "Placement",
    "PlacementError",
    "Report",
    "Traffic",
    "as_data",
    "check_placement",
    "common_node_size",
    "count_traffic",
    "make_report",
    "megatron_order",
    "pair_adjacent",
    "picture_svg",
    "picture_text",
    "slot_of_rank",
    "table_text",
    "traffic_text",
]
