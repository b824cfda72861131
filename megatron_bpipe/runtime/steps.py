"""Where one part of a backward ends and the next begins.

A backward runs the nodes of its graph from high sequence numbers to low ones. What a part of an
activation is needed for begins at the node with that part's highest number; a hook before that node
tells when it is reached.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import partial

from megatron_bpipe.runtime.graph import nodes_below
from megatron_bpipe.runtime.torch_internals import Node, sequence_of


def on_reaching(roots: Sequence[Node], back: Sequence[int], reached: Callable[[int], None]) -> None:
    """Call ``reached(part)`` when the backward of this graph comes to a part.

    Args:
        roots: of a finished graph.
        back: how far before the graph's end each part's last node is, in sequence numbers; as the
            first graph of this kind showed it, all others being built in the same order.
        reached: called once a part, the later layers' first; never for the last part, with which
            the backward begins.
    """
    top = max(map(sequence_of, roots), default=0)
    nodes = {sequence_of(node): node for node in nodes_below(roots)}
    numbers = sorted(number for number in nodes if number <= top)  # leaves have none of their own
    parts: dict[int, int] = {}  # the earliest layers' part that begins at a node
    for part in range(len(back) - 1):
        at = bisect.bisect_right(numbers, top - back[part]) - 1
        if at >= 0:
            parts.setdefault(numbers[at], part)
    for number, part in parts.items():
        nodes[number].register_prehook(partial(_reached, reached, part))


def _reached(reached: Callable[[int], None], part: int, gradients: object) -> None:
    reached(part)
