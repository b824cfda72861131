"""Flush-free schedules: 1F1B that runs on over the optimizer steps, with versions of the weights.

An op's version says which weights it uses; F and B of one micro-batch use the same ones on a
stage.  Stage 0 of p = 4::

    PipeDream    F0@0,F1@0,F2@0,F3@0,B0@0,F4@1,B1@0,F5@2,...   an update after every backward
    2BW, g = 4   F0@0,...,F3@0,B0@0,F4@0,...,F8@1,B5@0,...      one update for g micro-batches

PipeDream keeps p - x versions on stage x.  PipeDream-2BW accumulates the gradients of g >= p
micro-batches, uses weights one update old, and so needs two versions.  ContinuousPipe runs whole
mini-batches the way PipeDream runs micro-batches.

Sources: Narayanan et al. 2019 (PipeDream) and 2021 (PipeDream-2BW); the ContinuousPipe draft, which
does not say which weights a backward uses: here those of its forward.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.ops import Kind, Op, Schedule


def pipedream(p: int, m: int) -> Schedule:
    """PipeDream over ``m`` micro-batches with an update on each stage after every backward."""
    base = one_f_one_b(p, m)
    stages = []
    for line in base.stages:
        updates = 0
        version: dict[int, int] = {}
        out = []
        for op in line:
            if op.kind is Kind.FORWARD:
                version[op.microbatch] = updates
            else:
                updates += 1
            out.append(replace(op, version=version[op.microbatch]))
        stages.append(tuple(out))
    return replace(base, name="pipedream", stages=tuple(stages))


def pipedream_2bw(p: int, m: int, group: int | None = None) -> Schedule:
    """PipeDream-2BW over ``m`` micro-batches with an update every ``group`` of them (default p).

    Raises ValueError for a group below p, which would need more than two versions.
    """
    base = one_f_one_b(p, m)
    size = p if group is None else group
    if size < p:
        raise ValueError(f"group is {size}: two weight versions need p = {p} or more")

    def versioned(op: Op) -> Op:
        return replace(op, version=max(0, op.microbatch // size - 1))

    stages = tuple(tuple(map(versioned, line)) for line in base.stages)
    return replace(base, name="pipedream-2bw", stages=stages)


def continuous_pipe(p: int, n: int) -> Schedule:
    """ContinuousPipe over ``n`` mini-batches, each one op where others have a micro-batch."""
    return replace(pipedream(p, n), name="continuous")


def weight_versions(line: tuple[Op, ...]) -> int:
    """Most versions of the weights that one stage's line needs at the same time, at least 1.

    A version is needed from its first op to its last; the newest one is always kept.  One that
    exists before any op uses it is not seen: the last stage of 2BW counts one, where the published
    scheme keeps the second buffer already.
    """
    last = {op.version: index for index, op in enumerate(line) if op.version is not None}
    live: set[int] = set()
    newest, most = 0, 1
    for index, op in enumerate(line):
        if op.version is None:
            continue
        live.add(op.version)
        newest = max(newest, op.version)
        most = max(most, len(live | {newest}))
        if last[op.version] == index:
            live.discard(op.version)
    return most
