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
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.time.scheduled import held_in
from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.report.run import RunReport, StageReport, read_run
from megatron_bpipe.schedule.balancing.balance import BudgetError, balance
from megatron_bpipe.schedule.balancing.lending import Lending, LimitError
from megatron_bpipe.schedule.balancing.ways import MeasuredStage as StageBytes
from megatron_bpipe.schedule.balancing.ways import solve
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
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
    """A run: its stages, the budget it ran with (None: stock), its schedule, and its bytes.

    ``needs`` is what ``--bpipe-balance measured`` would work its loans out from.
    """

    stages: tuple[MeasuredStage, ...]
    budget: int | None
    spec: ScheduleSpec
    needs: tuple[StageBytes, ...]

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


def read_report(folder: Path) -> MeasuredRun:
    """Read ``memory.json`` of a folder; raises EstimateError naming the file and the field."""
    try:
        run = read_run(folder)
    except ReportError as error:
        raise EstimateError(str(error)) from error
    found = tuple(_stage(f"{folder / 'memory.json'}: stages[{s.stage}]", s) for s in run.stages)
    spec = ScheduleSpec(run.schedule, run.p, run.m, run.v)
    needs = tuple(_need(stage, here, run.v) for stage, here in zip(run.stages, found, strict=True))
    return MeasuredRun(found, _budget(run), spec, needs)


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


def measured_balance(
    run: MeasuredRun, capacity: int | None, micro_batches: int | None = None
) -> Lending:
    """What ``--bpipe-balance measured`` would do, with ``capacity`` as ``--bpipe-memory-limit``.

    Raises:
        LimitError: the capacity cannot be kept.
        EstimateError: the run's schedule has no loans of its own, or needs other sizes.
    """
    try:
        base = make(replace(run.spec, m=micro_batches or run.spec.m))
        return solve(base, run.needs, capacity)
    except LimitError:
        raise
    except ValueError as error:
        raise EstimateError(f"measured balance of {run.spec.name}: {error}") from error


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


def _need(report: StageReport, stage: MeasuredStage, chunks: int) -> StageBytes:
    """What the solver is asked; chunks are alike in reports that do not say more."""
    working = stage.working if report.working_bytes is None else report.working_bytes
    held = tuple(report.held_bytes or ()) or (stage.micro_batch // chunks,) * chunks
    return StageBytes(stage.static + working, held, tuple(report.leaving_bytes or ()) or held)


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
