"""Which adjacent messages Megatron posts as one batched call.

In the steady state of 1F1B a stage sends to and receives from the same neighbour at once::

    F4, (SF4, RB1), B1, (SB1, RF5), F5, ...

Posted one after the other these would deadlock: both neighbours would be sending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_bpipe.schedule.ops import Kind, Op

MESSAGES = frozenset((Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD))


def batches(ops: Sequence[Op]) -> Iterator[tuple[Op, ...]]:
    """The ops in order; (SF, RB) and (SB, RF) directly one after the other come as pairs.

    Both of a pair have the same direction, hence the same neighbour.  Everything else is alone.
    """
    position = 0
    while position < len(ops):
        size = batch_size(ops, position)
        yield tuple(ops[position : position + size])
        position += size


def batch_size(ops: Sequence[Op], position: int) -> int:
    """How many ops the batch that begins at this position has: 1 or 2."""
    kind = ops[position].kind
    if kind is Kind.SEND_FORWARD:
        wanted = Kind.RECV_BACKWARD
    elif kind is Kind.SEND_BACKWARD:
        wanted = Kind.RECV_FORWARD
    else:
        return 1
    if position + 1 == len(ops) or ops[position + 1].kind is not wanted:
        return 1
    return 2 if ops[position + 1].direction is ops[position].direction else 1
