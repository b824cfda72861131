"""Which adjacent messages are posted together.

In the steady state of 1F1B a stage sends to and receives from the same neighbour at once, as
Megatron-LM does::

    F4, (SF4, RB1), B1, (SB1, RF5), F5, ...

Posted one after the other these would deadlock: both neighbours would be sending.  Messages with
time labels are posted together where their labels are equal::

    F2.1, (SF2.1:9, RF3:9, RB0.1:9), B0.1, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_bpipe.schedule.ops import Kind, Op


def batches(ops: Sequence[Op]) -> Iterator[tuple[Op, ...]]:
    """The ops in order; messages that are posted together come as one tuple.

    These are messages with the same label, and, without labels, (SF, RB) and (SB, RF) directly one
    after the other and of one direction, hence with the same neighbour.  Everything else is alone.
    """
    position = 0
    while position < len(ops):
        size = batch_size(ops, position)
        yield tuple(ops[position : position + size])
        position += size


def batch_size(ops: Sequence[Op], position: int) -> int:
    """How many ops the batch that begins at this position has."""
    op = ops[position]
    if op.label is not None:
        end = position + 1
        while end < len(ops) and ops[end].label == op.label:
            end += 1
        return end - position
    if op.kind is Kind.SEND_FORWARD:
        wanted = Kind.RECV_BACKWARD
    elif op.kind is Kind.SEND_BACKWARD:
        wanted = Kind.RECV_FORWARD
    else:
        return 1
    if position + 1 == len(ops):
        return 1
    after = ops[position + 1]
    return 2 if after.kind is wanted and after.direction is op.direction else 1
