"""GPipe: all forwards, then all backwards.

p = 4, m = 8 with backwards first in, first out (one column a unit of time)::

    0  F0 F1 F2 F3 F4 F5 F6 F7  .  .  .  .  .  . B0 B1 B2 B3 B4 B5 B6 B7
    3   .  .  . F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7  .  .  .

First in, first out adds gradients up in 1F1B's order, so the numbers are bitwise those of 1F1B.
Last in, first out is what the ContinuousPipe draft prints, and equal but for rounding.

Bubble (p-1)/(m+p-1); every stage holds all m micro-batches, so there is nothing to balance.
Source: Huang et al. 2019, "GPipe".
"""

from __future__ import annotations

from megatron_bpipe.schedule.bases.sizes import check_sizes
from megatron_bpipe.schedule.ops import Kind, Op, Schedule


def gpipe(p: int, m: int, *, lifo: bool = False) -> Schedule:
    """GPipe of ``m`` micro-batches on ``p`` stages; raises ValueError for sizes below 1.

    ``lifo`` runs the backwards last in, first out.
    """
    check_sizes(p, m)
    forwards = [Op(Kind.FORWARD, i) for i in range(m)]
    order = reversed(range(m)) if lifo else range(m)
    backwards = [Op(Kind.BACKWARD, i) for i in order]
    return Schedule("gpipe-lifo" if lifo else "gpipe", m, ((*forwards, *backwards),) * p)
