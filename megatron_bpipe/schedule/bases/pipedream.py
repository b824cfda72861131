"""Flush-free schedules: 1F1B that runs on over the optimizer steps, with versions of the weights.

An op's version says which weights it uses; F and B of one micro-batch use the same ones on a
stage.  Stage 0 of p = 4::

    PipeDream    F0@0,F1@0,F2@0,F3@0,B0@0,F4@1,B1@0,F5@2,...   an update after every backward
    2BW, g = 4   F0@0,...,F3@0,B0@0,F4@0,...,F8@1,B5@0,...      one update for g micro-batches

PipeDream keeps p - x versions on stage x.  PipeDream-2BW accumulates the gradients of g >= p-1
micro-batches, uses weights one update old, and so needs two versions.  ContinuousPipe runs whole
mini-batches the way PipeDream runs micro-batches: MF0 of 2 micro-batches is F0,F1.

`WithoutFlush` says the same by iterations of a training loop, each of which ends with an update.

Sources: Narayanan et al. 2019 (PipeDream) and 2021 (PipeDream-2BW); the ContinuousPipe draft, which
does not say which weights a backward uses: here those of its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
            out.append(op._replace(version=version[op.microbatch]))
        stages.append(tuple(out))
    return replace(base, name="pipedream", stages=tuple(stages))


def pipedream_2bw(p: int, m: int, group: int | None = None) -> Schedule:
    """PipeDream-2BW over ``m`` micro-batches with an update every ``group`` of them (default p).

    Raises ValueError for a group below p-1, which would need more than two versions: stage 0 runs
    p-1 forwards ahead, and these must belong to the next group.
    """
    base = one_f_one_b(p, m)
    size = p if group is None else group
    if size < p - 1:
        raise ValueError(f"group is {size}: two weight versions need p-1 = {p - 1} or more")

    def versioned(op: Op) -> Op:
        return op._replace(version=max(0, op.microbatch // size - 1))

    stages = tuple(tuple(map(versioned, line)) for line in base.stages)
    return replace(base, name="pipedream-2bw", stages=stages)


def continuous_pipe(p: int, n: int, size: int = 1) -> Schedule:
    """ContinuousPipe over ``n`` mini-batches of ``size`` micro-batches each."""
    units = pipedream(p, n)

    def expanded(op: Op) -> list[Op]:
        first = op.microbatch * size
        return [op._replace(microbatch=first + i) for i in range(size)]

    stages = tuple(tuple(one for op in line for one in expanded(op)) for line in units.stages)
    return replace(units, name="continuous", microbatches=n * size, stages=stages)


@dataclass(frozen=True)
class WithoutFlush:
    """A schedule that runs on over the optimizer steps of a training loop.

    Attributes:
        run: the schedule of p stages, m micro-batches an iteration, so many iterations between
            two flushes; iteration k is over with the last backward of its micro-batches.
        lag: by how many updates the weights lag at most, of p stages on stage x.
        lags: the same in words.
    """

    run: Callable[[int, int, int], Schedule]
    lag: Callable[[int, int], int]
    lags: str


def _one_microbatch(p: int, m: int, iterations: int) -> Schedule:
    if m != 1:
        raise ValueError(
            f"m is {m}: PipeDream updates the weights after each micro-batch, so an iteration has "
            "1; use continuous or pipedream-2bw for more"
        )
    return pipedream(p, iterations)


def _two_versions(p: int, m: int, iterations: int) -> Schedule:
    # one iteration alone runs nothing ahead, whatever its size
    return pipedream_2bw(p, m * iterations, max(m, p) if iterations == 1 else m)


PIPEDREAM = WithoutFlush(_one_microbatch, lambda p, x: p - 1 - x, "p-1-x updates on stage x")
PIPEDREAM_2BW = WithoutFlush(_two_versions, lambda p, x: 1, "1 update on every stage")
CONTINUOUS = WithoutFlush(
    lambda p, m, n: continuous_pipe(p, n, m), lambda p, x: p - 1 - x, "p-1-x updates on stage x"
)


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
