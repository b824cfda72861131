"""All schedules by name: ``build("bpipe", p=8, m=16)``.

One row a schedule says how it is made, whether Megatron's loop can run it, and one line for people.
What it needs of p and m its generator says when it refuses.  Whoever wants a schedule (executor,
checks, simulator, estimator, drawings) asks here or, for one stage's lowered ops, ``stage_plan``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_bpipe.schedule.balancing.balance import balance
from megatron_bpipe.schedule.balancing.offload import offload
from megatron_bpipe.schedule.balancing.ways import Arrangement, lend
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.bases.chimera import chimera
from megatron_bpipe.schedule.bases.gpipe import gpipe
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.bases.pipedream import (
    CONTINUOUS,
    PIPEDREAM,
    PIPEDREAM_2BW,
    WithoutFlush,
    continuous_pipe,
    pipedream,
    pipedream_2bw,
)
from megatron_bpipe.schedule.bases.v_shape import v_shape
from megatron_bpipe.schedule.bases.zero_bubble import zb_h1
from megatron_bpipe.schedule.ops import Schedule, default_budget
from megatron_bpipe.schedule.validation.validate import validate


@dataclass(frozen=True)
class ScheduleSpec:
    """Which schedule, of which size; the same on all ranks.

    Attributes:
        name: in `CATALOGUE`.
        p: pipeline stages.
        m: micro-batches of an iteration.
        chunks: model chunks a stage, for schedules that have any number of them.
        group: micro-batches that go through a chunk together (N); None: p.
        balanced: whether evictions and loads keep every stage within ``budget``.
        budget: micro-batches of a whole stage, decimals allowed; None: the default of `balance`.
        parts: in how many an activation leaves and returns; 1: whole, as the paper has it.
        arrangement: who lends to whom, in place of the paper's rule; with it ``balanced`` is False.
    """

    name: str
    p: int
    m: int
    chunks: int = 2
    group: int | None = None
    balanced: bool = False
    budget: float | None = None
    parts: int = 1
    arrangement: Arrangement | None = None


@dataclass(frozen=True)
class Entry:
    """One schedule: how to make it, what to say of it, whether Megatron's loop runs it.

    Attributes:
        make: gives the logical schedule.
        note: one line for people.
        executed: whether Megatron's loop runs it.
        chunks: model chunks a stage that it is made of; None: any number from 2.
        splits_backward: weight gradients (W) are computed apart from B.
        v_placed: chunk 1 of stage x is part 2p-1-x of the model, so stage 0 has both of its ends.
        both_ways: a second pipeline goes up with a model of its own: stage x has parts x and p-1-x.
        without_flush: how it runs on over the optimizer steps; None if every iteration ends empty.
    """

    make: Callable[[ScheduleSpec], Schedule]
    note: str
    executed: bool = False
    splits_backward: bool = False
    chunks: int | None = 1
    v_placed: bool = False
    both_ways: bool = False
    without_flush: WithoutFlush | None = None

    def build(self, p: int, m: int) -> Schedule:
        """The schedule at its default settings, not validated."""
        return self.make(ScheduleSpec("", p, m))


def _of(base: Callable[[int, int], Schedule]) -> Callable[[ScheduleSpec], Schedule]:
    """Of p and m alone."""
    return lambda spec: base(spec.p, spec.m)


def _interleaved(spec: ScheduleSpec) -> Schedule:
    return interleaved(spec.p, spec.m, spec.chunks, spec.group)


def _v_entry(name: str, note: str) -> Entry:
    return Entry(
        _of(partial(v_shape, name=name)),
        note,
        executed=True,
        splits_backward=True,
        chunks=2,
        v_placed=True,
    )


def _zb_h1(spec: ScheduleSpec) -> Schedule:
    if not spec.balanced:
        return zb_h1(spec.p, spec.m)
    return zb_h1(spec.p, spec.m, default_budget(spec.p) if spec.budget is None else spec.budget)


CATALOGUE = {
    "1f1b": Entry(_of(one_f_one_b), "1F1B (DAPPLE), Megatron-LM's default", executed=True),
    "bpipe": Entry(
        lambda spec: balance(one_f_one_b(spec.p, spec.m)), "BPipe on 1F1B, the published budget"
    ),
    "gpipe": Entry(
        _of(gpipe), "GPipe: all forwards, then all backwards, first in, first out", executed=True
    ),
    "gpipe-lifo": Entry(
        _of(partial(gpipe, lifo=True)), "GPipe with backwards last in, first out", executed=True
    ),
    "pipedream": Entry(
        _of(pipedream),
        "PipeDream: no flush, p - x weight versions",
        executed=True,
        without_flush=PIPEDREAM,
    ),
    "pipedream-2bw": Entry(
        _of(pipedream_2bw),
        "PipeDream-2BW: no flush, two weight versions",
        executed=True,
        without_flush=PIPEDREAM_2BW,
    ),
    "continuous": Entry(
        _of(continuous_pipe),
        "ContinuousPipe: PipeDream over mini-batches",
        executed=True,
        without_flush=CONTINUOUS,
    ),
    "interleaved": Entry(
        _interleaved, "interleaved 1F1B, several chunks a stage", executed=True, chunks=None
    ),
    "interleaved-bpipe": Entry(
        lambda spec: balance(_interleaved(spec)),
        "BPipe on interleaved 1F1B, least budget",
        chunks=None,
    ),
    "chimera": Entry(
        _of(chimera),
        "Chimera: two pipelines in opposite directions",
        executed=True,
        both_ways=True,
    ),
    "zb-h1": Entry(
        _zb_h1,
        "zero-bubble H1: 1F1B's memory, W fills the bubble",
        executed=True,
        splits_backward=True,
    ),
    "zb-h1-bpipe": Entry(
        lambda spec: balance(zb_h1(spec.p, spec.m, default_budget(spec.p))),
        "BPipe on ZB-H1, the published budget",
        splits_backward=True,
    ),
    "v-min": _v_entry("v-min", "V-Min: a third of 1F1B's memory"),
    "v-half": _v_entry("v-half", "V-Half: half of 1F1B's memory"),
    "v-zb": _v_entry("v-zb", "V-ZB: no bubble, 1F1B's memory"),
    "host-offload": Entry(
        lambda spec: offload(one_f_one_b(spec.p, spec.m), default_budget(spec.p)),
        "1F1B with evictions to host memory, BPipe's budget",
    ),
}

EXECUTED = tuple(name for name, entry in CATALOGUE.items() if entry.executed)


def build(name: str, p: int, m: int) -> Schedule:
    """The named schedule, validated; raises ValueError for names, p or m that do not work."""
    schedule = make(ScheduleSpec(name, p, m))
    validate(schedule)
    return schedule


def make(spec: ScheduleSpec) -> Schedule:
    """The logical schedule of a specification, balanced if it asks for that.

    Raises:
        ValueError: for names, p or m that do not work; `BudgetError` for a budget too small.
    """
    if spec.name not in CATALOGUE:
        raise ValueError(f"schedule {spec.name!r} is not known: use {', '.join(CATALOGUE)}")
    schedule = CATALOGUE[spec.name].make(spec)
    if spec.arrangement is not None:
        return lend(schedule, spec.arrangement)
    return balance(schedule, spec.budget, spec.parts) if spec.balanced else schedule
