"""From a run's ``memory.json`` to what to change: which stage is tightest, which has room.

Everything here was measured: static memory (parameters, gradients, optimizer state), what one
micro-batch keeps on each stage, and what computing needs besides (logits, a recomputed layer).  So
a last stage full of logits, a first one with a large embedding or one with more experts' tokens
count for what they are, not only for being early or late.

Only how many micro-batches a stage holds under another budget comes from the schedule, the one that
is executed.

Units: bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.time.scheduled import held_in
from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.report.run import RunReport, StageReport, read_run
from megatron_bpipe.schedule.balancing.balance import BudgetError, balance
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.ops import default_budget, partner

MIB = 2**20


@dataclass(frozen=True)
class MeasuredStage:
    """One stage: static memory, one micro-batch, what computing needs besides, its GPU (or None).

    ``own`` is the peak of its activations in the run that was measured, ``pool`` what it lent.
    """

    static: int
    micro_batch: int
    working: int
    own: int
    pool: int
    device: int | None

    @property
    def total(self) -> int:
        """Its peak in that run."""
        return self.static + self.working + self.own + self.pool


@dataclass(frozen=True)
class MeasuredRun:
    """A run: its stages, and the budget it ran with (None: stock 1F1B)."""

    stages: tuple[MeasuredStage, ...]
    budget: int | None

    @property
    def totals(self) -> tuple[int, ...]:
        """Peak of each stage."""
        return tuple(stage.total for stage in self.stages)

    @property
    def tightest(self) -> int:
        """The fullest stage."""
        return self.totals.index(max(self.totals))

    @property
    def emptiest(self) -> int:
        """The stage with the most room."""
        return self.totals.index(min(self.totals))


@dataclass(frozen=True)
class Proposal:
    """Stock 1F1B (``budget`` None) or BPipe with that budget: the peak of each stage."""

    budget: int | None
    totals: tuple[int, ...]

    @property
    def tightest(self) -> int:
        """The fullest stage."""
        return self.totals.index(max(self.totals))


@dataclass(frozen=True)
class PairProposal:
    """Pairs (evictor, acceptor), micro-batches the evictor would keep, the fullest stage's peak."""

    pairs: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    highest: int


def read_report(folder: Path) -> MeasuredRun:
    """Read ``memory.json`` of a folder; raises EstimateError naming the file and the field."""
    try:
        run = read_run(folder)
    except ReportError as error:
        raise EstimateError(str(error)) from error
    found = tuple(_stage(f"{folder / 'memory.json'}: stages[{s.stage}]", s) for s in run.stages)
    return MeasuredRun(found, _budget(run))


def proposals(run: MeasuredRun, micro_batches: int | None = None) -> list[Proposal]:
    """Stock 1F1B and BPipe with every budget that changes something, from the largest down."""
    p = len(run.stages)
    m = micro_batches or 4 * p
    base = one_f_one_b(p, m)
    out = [Proposal(None, _totals(run, held_in(base)))]
    for budget in range(min(p, m) - 1, default_budget(p) - 1, -1):
        try:
            balanced = balance(base, budget)
        except BudgetError:
            break
        out.append(Proposal(budget, _totals(run, held_in(balanced))))
    return out


def best(found: Sequence[Proposal], capacity: int | None) -> Proposal:
    """The first that fits (fewest transfers); where none does, that with the lowest peak."""
    for proposal in found:
        if capacity is not None and max(proposal.totals) <= capacity:
            return proposal
    return min(found, key=lambda proposal: max(proposal.totals))


def best_pairs(run: MeasuredRun) -> PairProposal:
    """Fullest with emptiest, by measured peaks of stock 1F1B, and what that would come to.

    An evictor that keeps k of the n micro-batches it holds needs n - k + 1 slots on its acceptor,
    one more than it lacks while one leaves and one returns; an acceptor is full all the time then.
    """
    p = len(run.stages)
    held = [p - x for x in range(p)]
    totals = _stock_totals(run)
    order = sorted(range(p), key=lambda x: totals[x])
    pairs, kept, highest = [], [], 0
    for acceptor, evictor in zip(order[: p // 2], reversed(order), strict=False):
        peaks = {}
        for k in range(2, held[evictor] + 1):
            slots = held[evictor] - k + 1 if k < held[evictor] else 0
            stage = run.stages[evictor]
            here = totals[evictor] - (held[evictor] - k) * stage.micro_batch
            peaks[k] = max(here, totals[acceptor] + slots * stage.micro_batch)
        choice = min(peaks, key=lambda k: (peaks[k], -k), default=held[evictor])
        pairs.append((evictor, acceptor))
        kept.append(choice)
        highest = max(highest, peaks.get(choice, totals[evictor]))
    if p % 2:
        highest = max(highest, totals[order[p // 2]])
    return PairProposal(tuple(pairs), tuple(kept), highest)


def recomputed_shares(run: MeasuredRun, capacity: int) -> tuple[float, ...]:
    """For each stage what share of its layers to recompute so that stock 1F1B fits; above 1: never.

    A recomputed layer keeps its input only, which is left out here, so the true share is a little
    higher.
    """
    p = len(run.stages)
    totals = _stock_totals(run)
    shares = []
    for x, (stage, total) in enumerate(zip(run.stages, totals, strict=True)):
        activations = (p - x) * stage.micro_batch
        shares.append(max(0.0, (total - capacity) / activations) if activations else 0.0)
    return tuple(shares)


def _stock_totals(run: MeasuredRun) -> tuple[int, ...]:
    """Peak of each stage under stock 1F1B with at least as many micro-batches as stages."""
    p = len(run.stages)
    return _totals(run, [(p - x, 0) for x in range(p)])


def _totals(run: MeasuredRun, counts: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Peak of each stage that holds so many micro-batches and has so many on its partner."""
    p, totals = len(run.stages), []
    for x, (stage, (held, _)) in enumerate(zip(run.stages, counts, strict=True)):
        other = partner(x, p)
        lent = 0 if other is None else counts[other][1] * run.stages[other].micro_batch
        totals.append(stage.static + stage.working + held * stage.micro_batch + lent)
    return tuple(totals)


def _budget(run: RunReport) -> int | None:
    return int(run.budget) if run.bpipe and run.budget is not None else None


def _stage(where: str, stage: StageReport) -> MeasuredStage:
    own, held = stage.own_activation_bytes, stage.own_microbatches
    if held <= 0:
        raise EstimateError(f"{where}.own_microbatches is {held}: nothing was trained")
    if stage.allocator_peak_bytes is None:
        raise EstimateError(
            f"{where}.allocator_peak_bytes is null: the allocator of that run could not say; "
            "measure where it can (glibc 2.33 or later, or CUDA)"
        )
    return MeasuredStage(
        static=stage.static_bytes,
        micro_batch=int(own // held),
        working=max(0, stage.allocator_peak_bytes - own),
        own=own,
        pool=stage.pool_bytes,
        device=stage.device_bytes,
    )
