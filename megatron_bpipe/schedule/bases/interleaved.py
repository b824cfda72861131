"""Interleaved 1F1B: each stage has several chunks of layers, a micro-batch goes round v times.

Megatron-LM's order: groups of N micro-batches, chunk by chunk; backwards with the chunks reversed.
Stage 0 of p = 2, v = 2, N = 2, m = 2::

    F0,F1,F0.1,F1.1,B0.1,B1.1,B0,B1

N defaults to p (``--microbatch-group-size-per-virtual-pipeline-stage``).  The last group may be
smaller, down to p.  Bubble (p-1)/(v m + p-1) for N = p.  Stage x holds at most
2(p-1-x) + (v-1)N + 1 chunks, so a pair of stages always holds 2p + 2(v-1)N between them.

Source: Narayanan et al. 2021 (section 2.2), Korthikanti et al. 2022 (memory); Megatron-LM,
``get_schedule_table`` and ``forward_backward_pipelining_with_interleaving`` (its warm-up and its
conditions on N).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bpipe.schedule.bases.sizes import check_sizes
from megatron_bpipe.schedule.ops import Kind, Op, Schedule


def interleaved(p: int, m: int, chunks: int = 2, group: int | None = None) -> Schedule:
    """Megatron's interleaved 1F1B of ``m`` micro-batches on ``p`` stages of ``chunks`` chunks.

    Raises ValueError for sizes below 1, and for an m or a group size N that Megatron refuses:
    p <= N <= m, and the last group must have N or at least p micro-batches.
    """
    check_sizes(p, m)
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}: a stage has at least 1")
    size = p if group is None else group
    _check_group(p, m, size, group)
    order = list(_order(m, chunks, size))
    total = len(order)
    forwards = [Op(Kind.FORWARD, i, chunk) for i, chunk in order]
    backwards = [Op(Kind.BACKWARD, i, chunks - 1 - chunk) for i, chunk in order]
    stages = []
    for stage in range(p):
        warmup = min(2 * (p - stage - 1) + (chunks - 1) * size, total)
        pairs = zip(forwards[warmup:], backwards, strict=False)
        steady = [op for pair in pairs for op in pair]
        stages.append((*forwards[:warmup], *steady, *backwards[total - warmup :]))
    return Schedule("interleaved", m, tuple(stages))


def _check_group(p: int, m: int, size: int, group: int | None) -> None:
    if m < p:
        raise ValueError(f"m is {m}: interleaved 1F1B needs at least p = {p}; use {p}")
    if not p <= size <= m:
        raise ValueError(
            f"the group of micro-batches is {size}: it must be from p = {p} to m = {m}"
        )
    rest = m % size
    if 0 < rest < p:
        whole = f"p = {p}" if size == p else f"the group of {size} or p = {p} more than one"
        raise ValueError(
            f"m is {m}: interleaved 1F1B needs a multiple of {whole}; use {m - rest} or "
            f"{m - rest + p}"
        )


def _order(m: int, chunks: int, size: int) -> Iterator[tuple[int, int]]:
    """(micro-batch, chunk) of every forward, the same on all stages."""
    for first in range(0, m, size):
        for chunk in range(chunks):
            for microbatch in range(first, min(first + size, m)):
                yield microbatch, chunk
