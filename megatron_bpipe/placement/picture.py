"""A placement drawn with characters: one row of boxes per node, as in figure 2 (2401.02088)."""

from __future__ import annotations

from megatron_bpipe.placement.report import Report, Slot
from megatron_bpipe.placement.shape import ParallelShape

_WIDEST = 8  # boxes in one line


def picture_text(report: Report) -> str:
    """Boxes with GPU, stage, coordinates and pair; ``pair 3*`` has its partner on another node."""
    nodes = []
    for number, node in enumerate(report.nodes):
        lines = [f"Node {number}"]
        for start in range(0, len(node), _WIDEST):
            lines.extend(_boxes(node[start : start + _WIDEST], report))
        nodes.append("\n".join(lines))
    notes = []
    if report.after.pairs.across_nodes:
        notes.append("* partner on another node")
    return "\n\n".join(nodes + notes)


def _boxes(slots: tuple[Slot, ...], report: Report) -> list[str]:
    contents = [_content(slot, report) for slot in slots]
    width = max(len(text) for content in contents for text in content) + 2
    edge = "+" + "+".join("-" * width for _ in slots) + "+"
    body = [
        "|" + "|".join(text.center(width) for text in line) + "|"
        for line in zip(*contents, strict=True)
    ]
    return [edge, *body, edge]


def _content(slot: Slot, report: Report) -> list[str]:
    shape: ParallelShape = report.shape
    lines = [f"GPU {slot.gpu}", f"stage {slot.at.stage}"]
    for axis in ("tp", "cp", "dp"):
        if getattr(shape, axis) > 1:
            lines.append(f"{axis} {getattr(slot.at, axis)}")
    if slot.partner_gpu is None:
        lines.append("no pair")
    else:
        elsewhere = slot.partner_gpu // report.gpus_per_node != slot.node
        pair = min(slot.at.stage, shape.pp - 1 - slot.at.stage)
        lines.append(f"pair {pair}{'*' if elsewhere else ''}")
    return lines
