"""The re-evaluation's table 3, row by row: published beside what the estimates say.

Units: MFU in per cent, memory in GiB per GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.estimate.memory.activations import MEGATRON_2023
from megatron_bpipe.estimate.memory.stages import Verdict, peak_gib, verdict
from megatron_bpipe.estimate.paper.equations import equation_3
from megatron_bpipe.estimate.paper.published import DECISIONS, EXPERIMENTS, Experiment
from megatron_bpipe.estimate.paper.refined import (
    Constants,
    Measured,
    fit,
    leave_one_out,
    predict_mfu,
)
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.estimate.time.kernels.fused_softmax_rules import RULES, softmax_trap


@dataclass(frozen=True)
class TableRow:
    """One experiment of table 3; MFU in per cent.

    ``equation_mfu`` equation 3; ``physics_mfu`` without any BPipe constant, fitted on the rows
    without BPipe; ``refined_mfu`` with the one empirical BPipe penalty; ``refined_loo_mfu`` the
    same with this row left out of the fit; ``fits`` as run, ``fits_without_bpipe`` (our inference:
    the re-evaluation does not say); ``softmax_trap`` a warning or None.
    """

    id: int
    model: str
    micro_batch: int
    bpipe: bool
    attention: Attention
    published_mfu: float
    equation_mfu: float
    physics_mfu: float
    refined_mfu: float
    refined_loo_mfu: float
    fits: Verdict
    fits_without_bpipe: Verdict
    peak_gib: float
    peak_gib_without_bpipe: float
    softmax_trap: str | None


def measured(experiment: Experiment) -> Measured:
    """The experiment as the refined estimate takes it: A100 80 GiB, Megatron of 2023."""
    return Measured(experiment.run(), A100_80G, experiment.stage_mfu, experiment.mfu, MEGATRON_2023)


def published_cases() -> tuple[Measured, ...]:
    """All ten experiments."""
    return tuple(measured(experiment) for experiment in EXPERIMENTS)


@lru_cache(maxsize=1)
def published_constants() -> Constants:
    """The constants fitted on all ten experiments."""
    return fit(published_cases())


def table_rows() -> tuple[TableRow, ...]:
    """All ten rows."""
    cases = published_cases()
    constants = published_constants()
    physics = Constants(constants.exchange, 0)
    left_out = leave_one_out(cases)
    return tuple(
        _row(experiment, predict_mfu(case, physics), predict_mfu(case, constants), loo)
        for experiment, case, loo in zip(EXPERIMENTS, cases, left_out, strict=True)
    )


@dataclass(frozen=True)
class Decision:
    """MFU points that BPipe wins going from one row to another, published and estimated."""

    before: int
    after: int
    published: float
    equation: float
    refined: float
    refined_loo: float


def decisions(rows: Sequence[TableRow]) -> tuple[Decision, ...]:
    """The four published choices; ``refined_loo`` estimates each row with itself left out."""
    by_id = {row.id: row for row in rows}

    def gain(before: int, after: int, column: str) -> float:
        won: float = getattr(by_id[after], column) - getattr(by_id[before], column)
        return won

    return tuple(
        Decision(
            before,
            after,
            published=gain(before, after, "published_mfu"),
            equation=gain(before, after, "equation_mfu"),
            refined=gain(before, after, "refined_mfu"),
            refined_loo=gain(before, after, "refined_loo_mfu"),
        )
        for before, after in DECISIONS
    )


def _row(experiment: Experiment, physics: float, refined: float, left_out: float) -> TableRow:
    run, without = experiment.run(), experiment.run(bpipe=False)
    batch, p = run.global_batch, run.layout.pp
    needed = peak_gib(run, MEGATRON_2023)
    needed_without = peak_gib(without, MEGATRON_2023)
    return TableRow(
        id=experiment.id,
        model=experiment.model,
        micro_batch=experiment.micro_batch,
        bpipe=experiment.bpipe,
        attention=experiment.attention,
        published_mfu=experiment.mfu,
        equation_mfu=equation_3(experiment.stage_mfu, run.micro_batch, batch, p),
        physics_mfu=physics,
        refined_mfu=refined,
        refined_loo_mfu=left_out,
        fits=verdict(needed, A100_80G.memory_gib),
        fits_without_bpipe=verdict(needed_without, A100_80G.memory_gib),
        peak_gib=needed,
        peak_gib_without_bpipe=needed_without,
        softmax_trap=softmax_trap(run, RULES["2023"]),
    )
