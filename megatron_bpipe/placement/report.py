"""A placement in words: as plain data for JSON, as a table, and as a picture like figure 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron_bpipe.placement.columns import columns
from megatron_bpipe.placement.inter_node_traffic import Traffic, count_traffic
from megatron_bpipe.placement.pair_adjacent import (
    Placement,
    megatron_order,
    pair_adjacent,
    slot_of_rank,
)
from megatron_bpipe.placement.shape import Coordinates, ParallelShape, PlacementError
from megatron_bpipe.schedule.ops import partner

PLACEMENTS = {"pair-adjacent": pair_adjacent, "megatron": megatron_order}

_TITLES = {
    "pairs": "pairs (evictor, acceptor)",
    "pipeline_edges": "pipeline edges",
    "dp_rings": "dp rings (dp x cp)",
    "cp_rings": "cp rings",
    "ep_groups": "ep groups",
    "tp_groups": "tp groups",
}


@dataclass(frozen=True)
class Slot:
    """One GPU: its number in the job and on its node, who runs there, and the partner's GPU."""

    gpu: int
    local_gpu: int
    node: int
    rank: int
    at: Coordinates
    partner_gpu: int | None


@dataclass(frozen=True)
class Report:
    """A named placement with what crosses nodes before (Megatron's order) and after."""

    name: str
    shape: ParallelShape
    gpus_per_node: int
    placement: Placement
    before: Traffic
    after: Traffic

    @property
    def nodes(self) -> tuple[tuple[Slot, ...], ...]:
        """The GPUs of each node."""
        size, shape = self.gpus_per_node, self.shape
        gpu_of = slot_of_rank(self.placement)

        def slot(gpu: int) -> Slot:
            rank = self.placement[gpu]
            at = shape.coordinates(rank)
            other = partner(at.stage, shape.pp)
            partner_gpu = (
                None if other is None else gpu_of[rank + (other - at.stage) * shape.stage_stride]
            )
            return Slot(gpu, gpu % size, gpu // size, rank, at, partner_gpu)

        return tuple(
            tuple(slot(gpu) for gpu in range(first, first + size))
            for first in range(0, shape.world, size)
        )


def make_report(shape: ParallelShape, gpus_per_node: int, name: str = "pair-adjacent") -> Report:
    """Place the job and count what crosses nodes.

    Raises PlacementError for an unknown placement or what the placement itself refuses.
    """
    if name not in PLACEMENTS:
        raise PlacementError(f"placement {name!r} is not known: use {' or '.join(PLACEMENTS)}")
    placement = PLACEMENTS[name](shape, gpus_per_node)
    stock = megatron_order(shape, gpus_per_node)
    return Report(
        name,
        shape,
        gpus_per_node,
        placement,
        before=count_traffic(shape, stock, gpus_per_node),
        after=count_traffic(shape, placement, gpus_per_node),
    )


def as_data(report: Report) -> dict[str, object]:
    """Plain data for JSON.

    ``nodes`` is a list of nodes, each a list of GPUs; ``*_across_nodes`` are the counts under this
    placement; ``before`` and ``after`` have each count with its total.
    """
    shape = report.shape
    return {
        "placement": report.name,
        "order": shape.order,
        "world": shape.world,
        "sizes": {axis: getattr(shape, axis) for axis in ("tp", "cp", "ep", "dp", "pp")},
        "gpus_per_node": report.gpus_per_node,
        "nodes": [[_slot_data(slot) for slot in node] for node in report.nodes],
        **{f"{key}_across_nodes": c["across_nodes"] for key, c in asdict(report.after).items()},
        "before": asdict(report.before),
        "after": asdict(report.after),
    }


def _slot_data(slot: Slot) -> Mapping[str, int | None]:
    return {
        "gpu": slot.gpu,
        "local_gpu": slot.local_gpu,
        "rank": slot.rank,
        "stage": slot.at.stage,
        "tp": slot.at.tp,
        "cp": slot.at.cp,
        "dp": slot.at.dp,
        "ep": slot.at.ep,
        "partner_gpu": slot.partner_gpu,
    }


def traffic_text(report: Report) -> str:
    """What crosses nodes, Megatron's order beside this placement."""
    rows = [("across nodes", "megatron order", report.name)]
    for key, title in _TITLES.items():
        before, after = getattr(report.before, key), getattr(report.after, key)
        if after.total:
            rows.append((title, str(before), str(after)))
    return columns(rows)


def table_text(report: Report) -> str:
    """One line per GPU: node, GPU, logical rank, stage, coordinates, the partner's GPU."""
    rows: list[tuple[str, ...]] = [
        ("node", "gpu", "rank", "stage", "tp", "cp", "dp", "ep", "partner")
    ]
    for node in report.nodes:
        for slot in node:
            at = slot.at
            numbers = (slot.node, slot.gpu, slot.rank, at.stage, at.tp, at.cp, at.dp, at.ep)
            rows.append((*map(str, numbers), _partner_text(slot, report.gpus_per_node)))
    return columns(rows)


def _partner_text(slot: Slot, gpus_per_node: int) -> str:
    if slot.partner_gpu is None:
        return "none (middle stage)"
    elsewhere = slot.partner_gpu // gpus_per_node
    return f"gpu {slot.partner_gpu}" + ("" if elsewhere == slot.node else f" (node {elsewhere})")
