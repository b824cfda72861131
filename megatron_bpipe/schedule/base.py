"""Base schedules: lines of F and B that the balance pass starts from.

1F1B of Megatron-LM, p = 4, m = 8 (``draw(one_f_one_b(4, 8))``; columns are unit time)::

    0  F0 F1 F2 F3  .  .  . B0 F4 B1 F5 B2 F6 B3 F7 B4  . B5  . B6  . B7
    1   . F0 F1 F2  .  . B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5  . B6  . B7  .
    2   .  . F0 F1  . B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6  . B7  .  .
    3   .  .  . F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7  .  .  .

Stage x holds up to min(m, p-x) micro-batches: the imbalance of section 2.2 of the re-evaluation.
"""

from __future__ import annotations

from megatron_bpipe.schedule.ops import Kind, Op, Schedule


def one_f_one_b(p: int, m: int) -> Schedule:
    """Megatron's non-interleaved 1F1B of ``m`` micro-batches on ``p`` stages.

    Stage x runs min(p-x-1, m) warm-up forwards, then pairs of one forward and one backward, then
    the remaining backwards.  Raises ValueError for p < 1 or m < 1.
    """
    if p < 1:
        raise ValueError(f"p is {p}: a pipeline has at least 1 stage")
    if m < 1:
        raise ValueError(f"m is {m}: an iteration has at least 1 micro-batch")
    forward = [Op(Kind.FORWARD, i) for i in range(m)]
    backward = [Op(Kind.BACKWARD, i) for i in range(m)]
    stages = []
    for stage in range(p):
        warmup = min(p - stage - 1, m)
        steady = [op for pair in zip(forward[warmup:], backward, strict=False) for op in pair]
        stages.append((*forward[:warmup], *steady, *backward[m - warmup :]))
    return Schedule("1f1b", m, tuple(stages))
