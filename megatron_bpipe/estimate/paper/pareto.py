"""MFU against memory: BPipe and its rivals on one model and cluster, each by simulation.

All use the stage times of the re-evaluation's table 5.  Full recomputation, which it has not, takes
that of flash attention with one more forward: 3/4 of its MFU.  BPipe appears twice: as simulated,
where NVLink hides its transfers, and with the penalty fitted on its own BPipe runs, per
byte moved; interleaved BPipe has the same.  No such penalty is known for the others: their
transfers and messages cost what the simulation says.

Units: MFU in per cent, GiB per GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.estimate.memory.activations import MEGATRON_2023
from megatron_bpipe.estimate.memory.stages import GIB, Verdict, verdict
from megatron_bpipe.estimate.models import model_named
from megatron_bpipe.estimate.paper.op_costs import inputs_for
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, GLOBAL_BATCH, LAYOUT
from megatron_bpipe.estimate.paper.refined import Constants, Measured, bytes_moved
from megatron_bpipe.estimate.runs import Attention, Run
from megatron_bpipe.estimate.time.flops import equation_1, mfu_percent
from megatron_bpipe.estimate.time.scheduled import budgets_of
from megatron_bpipe.schedule.balancing.balance import balance
from megatron_bpipe.schedule.bases.catalogue import build
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import quantity
from megatron_bpipe.simulate.engine import simulate
from megatron_bpipe.simulate.exposed import exposed_seconds
from megatron_bpipe.simulate.memory import memory_peaks

METHODS: tuple[tuple[str, str, Attention], ...] = (
    ("1F1B", "1f1b", "flash"),
    ("BPipe", "bpipe", "flash"),
    ("interleaved", "interleaved", "flash"),
    ("interleaved BPipe", "interleaved-bpipe", "flash"),
    ("V-Half", "v-half", "flash"),
    ("host offload", "host-offload", "flash"),
    ("selective recomputation", "1f1b", "recompute"),
    ("full recomputation", "1f1b", "full"),
)
"""Name, schedule, attention."""


@dataclass(frozen=True)
class Point:
    """One way to train; ``mfu_with_penalty`` differs from ``mfu`` with BPipe only."""

    method: str
    micro_batch: int
    mfu: float
    mfu_with_penalty: float
    peak_gib: float
    exposed_seconds: float

    @property
    def fits(self) -> Verdict:
        """Whether it fits on the GPU."""
        return verdict(self.peak_gib, A100_80G.memory_gib)


def points(model: str, constants: Constants, sizes: Sequence[int] = (1, 2, 4)) -> list[Point]:
    """All methods at all micro-batches whose stage the re-evaluation measured."""
    known = {(e.micro_batch, e.attention): e.stage_mfu for e in EXPERIMENTS if e.model == model}
    out = []
    for method, name, attention in METHODS:
        for b in sizes:
            mfu = known.get((b, "flash" if attention == "full" else attention))
            if mfu is not None:
                mfu = 3 / 4 * mfu if attention == "full" else mfu
                out.append(_point(method, name, model, attention, b, mfu, constants))
    return out


def by_budget(model: str, constants: Constants, b: int) -> list[Point]:
    """Interleaved BPipe with each budget, from what evicts nothing to the least."""
    known = {(e.micro_batch, e.attention): e.stage_mfu for e in EXPERIMENTS if e.model == model}
    run = Run(model_named(model), LAYOUT, b, GLOBAL_BATCH, "flash", chunks=2)
    method, name, attention = METHODS[3]
    return [
        _point(method, name, model, attention, b, known[b, "flash"], constants, budget)
        for budget in budgets_of(run)
    ]


def frontier(found: Sequence[Point]) -> list[Point]:
    """Those that fit and that no other beats in both memory and MFU (with its penalty)."""
    fitting = sorted(
        (p for p in found if p.fits != "no"), key=lambda p: (p.peak_gib, -p.mfu_with_penalty)
    )
    best: list[Point] = []
    for point in fitting:
        if not best or point.mfu_with_penalty > best[-1].mfu_with_penalty:
            best.append(point)
    return best


def _point(
    method: str,
    name: str,
    model: str,
    attention: Attention,
    b: int,
    stage_mfu: float,
    constants: Constants,
    budget: float | None = None,
) -> Point:
    run = Run(model_named(model), LAYOUT, b, GLOBAL_BATCH, attention)
    case = Measured(run, A100_80G, stage_mfu, 0.0, MEGATRON_2023)
    schedule = build(name, LAYOUT.pp, run.micro_batches)
    if budget is not None:
        schedule = balance(build("interleaved", LAYOUT.pp, run.micro_batches), budget)
    given = inputs_for(case, constants, schedule)
    found = simulate(lower(schedule), given.costs, given.network)
    penalty = 0.0
    if name in ("bpipe", "interleaved-bpipe"):
        evicting = replace(run, bpipe=True, chunks=schedule.chunks, budget=schedule.budget)
        penalty = constants.bpipe * bytes_moved(evicting, MEGATRON_2023)
    flops = equation_1(run.model, GLOBAL_BATCH)

    def mfu(seconds: float) -> float:
        return mfu_percent(flops, seconds, LAYOUT.gpus, A100_80G.flops)

    return Point(
        f"{method}, budget {quantity(budget)}" if budget is not None else method,
        b,
        mfu(found.seconds),
        mfu(found.seconds + penalty),
        max(memory_peaks(found, given.sizes)) / GIB,
        exposed_seconds(found),
    )
