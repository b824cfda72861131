"""A placement as an SVG picture: nodes, GPUs coloured by pair, an arc between the two of a pair.

Units: pixels.
"""

from __future__ import annotations

from megatron_bpipe.placement.report import Report, Slot

_BOX, _GAP, _MARGIN = 76, 10, 24
_TITLE, _ARC, _LINE = 46, 46, 15
_WIDEST = 16  # boxes in one row
_NARROWEST = 620  # so that the title fits


def picture_svg(report: Report) -> str:
    """The whole document as text; arcs are drawn inside a node, a red edge marks a torn pair."""
    columns = min(report.gpus_per_node, _WIDEST)
    rows = -(-report.gpus_per_node // columns)
    node_width = columns * (_BOX + _GAP) + _GAP
    node_height = 30 + rows * (_BOX + _ARC) + _GAP
    width = max(node_width + 2 * _MARGIN, _NARROWEST)
    height = _TITLE + len(report.nodes) * (node_height + _MARGIN) + _MARGIN
    pairs, edges = report.after.pairs, report.after.pipeline_edges
    title = f"{report.name}: {pairs} pairs and {edges} pipeline edges cross nodes"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" text-anchor="middle">',
        f'<rect x="0" y="0" width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2:g}" y="30" font-size="16">{title}</text>',
    ]
    for number, node in enumerate(report.nodes):
        top = _TITLE + number * (node_height + _MARGIN)
        parts.append(
            f'<rect x="{_MARGIN}" y="{top}" width="{node_width}" height="{node_height}" rx="8" '
            'fill="#f6f6f6" stroke="#888888"/>'
        )
        parts.append(_text(_MARGIN + node_width / 2, top + 20, 13, f"Node {number}"))
        for slot in node:
            parts.extend(_slot(slot, report, top + 30, columns))
    return "\n".join([*parts, "</svg>", ""])


def _corner(local_gpu: int, top: float, columns: int) -> tuple[float, float]:
    row, column = divmod(local_gpu, columns)
    return _MARGIN + _GAP + column * (_BOX + _GAP), top + row * (_BOX + _ARC)


def _slot(slot: Slot, report: Report, top: float, columns: int) -> list[str]:
    shape = report.shape
    x, y = _corner(slot.local_gpu, top, columns)
    mid = x + _BOX / 2
    local = slot.partner_gpu is not None and slot.partner_gpu // report.gpus_per_node == slot.node
    torn = slot.partner_gpu is not None and not local
    edge = 'stroke="#cc0000" stroke-width="3"' if torn else 'stroke="#444444"'
    axes = " ".join(
        f"{axis}{getattr(slot.at, axis)}" for axis in ("tp", "cp", "dp") if getattr(shape, axis) > 1
    )
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{_BOX}" height="{_BOX}" rx="5" '
        f'fill="{_colour(slot, shape.pp)}" {edge}/>',
        _text(mid, y + _LINE + 2, 12, f"GPU {slot.gpu}"),
        _text(mid, y + 2.8 * _LINE, 15, f"stage {slot.at.stage}"),
        _text(mid, y + 4.3 * _LINE, 11, axes),
    ]
    if local and slot.partner_gpu is not None and slot.partner_gpu > slot.gpu:
        other_x, other_y = _corner(slot.partner_gpu % report.gpus_per_node, top, columns)
        other_mid = other_x + _BOX / 2
        depth = _BOX + _ARC * (1 - 0.15 * (slot.at.tp % 4))  # arcs of one TP group stay apart
        parts.append(
            f'<path d="M {mid:g} {y + _BOX:g} C {mid:g} {y + depth:g}, {other_mid:g} '
            f'{other_y + depth:g}, {other_mid:g} {other_y + _BOX:g}" fill="none" '
            'stroke="#333333" stroke-width="2"/>'
        )
    return parts


def _text(x: float, y: float, size: int, text: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}">{text}</text>'


def _colour(slot: Slot, p: int) -> str:
    if slot.partner_gpu is None:
        return "#dddddd"
    pair = min(slot.at.stage, p - 1 - slot.at.stage)
    return f"hsl({pair * 360 // max(1, p // 2)}, 60%, {82 if slot.at.stage == pair else 72}%)"
