"""The bound in bytes: what a stage and its lenders hold at most, from the first forward's sizes.

A part is not exactly its share of an activation, since no storage is divided.  The first k parts of
u hold at least k shares and less than one storage (*block*) more.  So on the evictor what is left
is never more than its units; only in a backward that runs part by part, whose late parts are freed
first, the rest may be one block more::

    own bytes   <=  units here x share  +  what cannot leave of each activation  +  one block
    lent bytes  <=  units there x share  +  one block for each activation that is there in part

A lender runs its own backwards whole.  Where chunks differ (embedding, head) each counts its own
share.  A storage counts in the part that needs it first; one that an earlier part uses too is freed
with that one, and is not foreseen here.

Units: bytes; sizes are by chunk, of one activation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_bpipe.schedule.ops import ActivationKey, Kind, Op


def own_bytes(
    line: Sequence[Op],
    held: Sequence[int],
    leaving: Sequence[int],
    parts: int = 1,
    block: int = 0,
) -> int:
    """Most bytes of a stage's own activations at any step of its line.

    Args:
        line: logical or lowered.
        held: bytes of an activation.
        leaving: those of it that can leave.
        parts: in how many.
        block: of the largest storage.
    """
    here: Counter[int] = Counter()  # units by chunk
    alive: Counter[int] = Counter()  # activations, wherever they are
    out: Counter[int] = Counter()
    back: Counter[int] = Counter()
    most = 0
    for op in line:
        if op.kind is Kind.EVICT:
            out[op.chunk] += 1
        elif op.kind is Kind.LOAD:
            back[op.chunk] += 1
        elif op.kind.computation:
            here.update(back)
            if op.kind is Kind.FORWARD:
                here[op.chunk] += parts
                alive[op.chunk] += 1
            size = sum(alive[c] * (held[c] - leaving[c]) * parts for c in alive)
            most = max(most, size + sum(here[c] * leaving[c] for c in here))
            here.subtract(out)
            if op.kind is Kind.BACKWARD:
                here[op.chunk] -= parts if op.part is None else 1
                alive[op.chunk] -= not op.part
            out, back = Counter(), Counter()
    in_parts = any(op.kind is Kind.BACKWARD and op.part is not None for op in line)
    return -(-most // parts) + (block if in_parts else 0)


def lent_bytes(line: Sequence[Op], leaving: Sequence[int], parts: int = 1, block: int = 0) -> int:
    """Most bytes of one evictor's activations elsewhere, at any step of its line; see `own_bytes`.

    ``line`` may leave out transfers with other lenders (`occupancy.transfers_with`).
    """
    there: Counter[ActivationKey] = Counter()  # units
    back: list[ActivationKey] = []
    most = 0
    for op in line:
        if op.kind is Kind.EVICT:
            there[op.key] += 1
        elif op.kind is Kind.LOAD:
            back.append(op.key)
        elif op.kind.computation:
            units = sum(count * leaving[key.chunk] for key, count in there.items())
            some = sum(0 < count < parts for count in there.values())
            most = max(most, units + some * block * parts)
            there.subtract(back)
            back.clear()
    return -(-most // parts)
