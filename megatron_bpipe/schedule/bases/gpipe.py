"""GPipe: all forwards, then all backwards in reverse order.

p = 4, m = 8, as the ContinuousPipe draft prints it (one column a unit of time)::

    0  F0 F1 F2 F3 F4 F5 F6 F7  .  .  .  .  .  . B7 B6 B5 B4 B3 B2 B1 B0
    3   .  .  . F0 F1 F2 F3 F4 F5 F6 F7 B7 B6 B5 B4 B3 B2 B1 B0  .  .  .

Bubble (p-1)/(m+p-1); every stage holds all m micro-batches.
Source: Huang et al. 2019, "GPipe".
"""

from __future__ import annotations

from megatron_bpipe.schedule.bases.sizes import check_sizes
from megatron_bpipe.schedule.ops import Kind, Op, Schedule


def gpipe(p: int, m: int) -> Schedule:
    """GPipe of ``m`` micro-batches on ``p`` stages; raises ValueError for sizes below 1."""
    check_sizes(p, m)
    forwards = [Op(Kind.FORWARD, i) for i in range(m)]
    backwards = [Op(Kind.BACKWARD, i) for i in reversed(range(m))]
    return Schedule("gpipe", m, ((*forwards, *backwards),) * p)
