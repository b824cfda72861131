"""Interleaved 1F1B: each stage has several chunks of layers, a micro-batch goes round v times.

Megatron-LM's order: groups of p micro-batches, chunk by chunk; backwards with the chunks reversed.
Stage 0 of p = 2, v = 2, m = 2::

    F0,F1,F0.1,F1.1,B0.1,B1.1,B0,B1

Bubble (p-1)/(v m + p-1); stage 0 holds v p + p - 1 chunks, i.e. 1 + (p-1)/(v p) times what 1F1B
does.  Source: Narayanan et al. 2021 (section 2.2), Korthikanti et al. 2022 (the factor);
megatron/core/pipeline_parallel/schedules.py.
"""

from __future__ import annotations

from megatron_bpipe.schedule.bases.sizes import check_sizes
from megatron_bpipe.schedule.ops import Kind, Op, Schedule


def interleaved(p: int, m: int, chunks: int = 2) -> Schedule:
    """Megatron's interleaved 1F1B; raises ValueError unless m is a multiple of p."""
    check_sizes(p, m, multiple=True, name="interleaved 1F1B")
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}: a stage has at least 1")
    total = m * chunks
    forwards = [_op(Kind.FORWARD, k, p, chunks) for k in range(total)]
    backwards = [_op(Kind.BACKWARD, k, p, chunks) for k in range(total)]
    stages = []
    for stage in range(p):
        warmup = min(2 * (p - stage - 1) + (chunks - 1) * p, total)
        pairs = zip(forwards[warmup:], backwards, strict=False)
        steady = [op for pair in pairs for op in pair]
        stages.append((*forwards[:warmup], *steady, *backwards[total - warmup :]))
    return Schedule("interleaved", m, tuple(stages))


def _op(kind: Kind, k: int, p: int, chunks: int) -> Op:
    """The k-th forward or backward of every stage."""
    chunk = k // p % chunks
    microbatch = k // (p * chunks) * p + k % p
    return Op(kind, microbatch, chunk if kind is Kind.FORWARD else chunks - 1 - chunk)
