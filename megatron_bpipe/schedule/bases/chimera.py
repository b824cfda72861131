"""Chimera: two pipelines in opposite directions over the same stages.

Half of each p micro-batches goes down from stage 0, half up from stage p-1; every stage keeps both
its layers and those of stage p-1-x.  p = 4, m = 4 in unit time::

    0  F0    F1 F2~ B2~ F3~ B3~ B0     B1
    1     F0 F2~ F1 F3~ B2~ B0  B3~ B1

Forward i of a half stands at time x + 2i, its backward at 2p-1-x + 2i (x counted from where that
half enters); for even p the halves never want a stage at once.  Further groups of p follow 2p
later and fill the gaps of the one before ("direct concatenation").

Bubble (p-2)/(2m+p-2) with F = B: half of 1F1B's; two copies of the weights; from
p/2 + 1 micro-batches on the outer stages to p on the inner ones.
Source: Li and Hoefler 2021, "Chimera".
"""

from __future__ import annotations

from megatron_bpipe.schedule.bases.sizes import check_sizes
from megatron_bpipe.schedule.ops import DOWN, UP, Kind, Op, Schedule


def chimera(p: int, m: int) -> Schedule:
    """Chimera of ``m`` micro-batches; raises ValueError unless p is even and m a multiple of p."""
    check_sizes(p, m, multiple=True, name="Chimera")
    if p % 2:
        raise ValueError(f"p is {p}: Chimera needs an even number of stages; use {p + 1}")
    stages = []
    for stage in range(p):
        timed = []
        for microbatch in range(m):
            group, place = divmod(microbatch, p)
            up = place >= p // 2
            start = 2 * p * group + 2 * (place % (p // 2))
            depth = p - 1 - stage if up else stage
            way = UP if up else DOWN
            timed.append((start + depth, Op(Kind.FORWARD, microbatch, direction=way)))
            timed.append((start + 2 * p - 1 - depth, Op(Kind.BACKWARD, microbatch, direction=way)))
        timed.sort(key=lambda entry: entry[0])
        stages.append(tuple(op for _, op in timed))
    return Schedule("chimera", m, tuple(stages))
