"""What parts of docs/planning/reproduction.md share: rows of table 3 simulated on other links."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_bpipe.estimate.paper.multipliers import multipliers_leave_one_out
from megatron_bpipe.estimate.paper.op_costs import inputs_for
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, LAYOUT
from megatron_bpipe.estimate.paper.refined import Measured
from megatron_bpipe.estimate.paper.tables import (
    measured,
    published_cases,
    published_constants,
    table_rows,
)
from megatron_bpipe.schedule.bases.catalogue import build
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.simulate import Link, Network, exposed_seconds, simulate

GIB = 2**30


def errors() -> str:
    """Mean and worst error of each estimate."""
    rows = table_rows()
    published = [row.published_mfu for row in rows]
    columns = {
        "eq. 3": [row.equation_mfu for row in rows],
        "physics": [row.physics_mfu for row in rows],
        "refined": [row.refined_mfu for row in rows],
        "refined, each row left out": [row.refined_loo_mfu for row in rows],
        "two bare multipliers, each row left out": multipliers_leave_one_out(published_cases()),
    }
    texts = []
    for name, values in columns.items():
        apart = [abs(a - b) for a, b in zip(values, published, strict=True)]
        texts.append(f"{name} {sum(apart) / len(apart):.2f} (worst {max(apart):.2f})")
    return "; ".join(texts) + "."


def bpipe_case(row: int, **changes: Any) -> Measured:
    """A row of table 3 as the estimator takes it, its run changed."""
    case = measured(next(e for e in EXPERIMENTS if e.id == row))
    return replace(case, run=replace(case.run, **changes)) if changes else case


def exposed_at(row: int, bandwidth: float, tp_share: float = 0.0) -> tuple[float, float]:
    """Seconds that a row's transfers add at this bandwidth, and those of the whole iteration."""
    case = bpipe_case(row)
    schedule = build("bpipe", LAYOUT.pp, case.run.micro_batches)
    given = inputs_for(case, published_constants(), schedule)
    network = Network(Link(bandwidth), tp_share=tp_share)
    found = simulate(lower(schedule), given.costs, network)
    return exposed_seconds(found), found.seconds


def least_bandwidth(row: int) -> float:
    """The slowest link (bytes a second) at which this row's transfers stay hidden."""
    low, high = 1e9, 300e9
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        exposed, seconds = exposed_at(row, middle)
        low, high = (low, middle) if exposed < 1e-4 * seconds else (middle, high)
    return high


def percent(part: float, whole: float) -> str:
    """What transfers add, in per cent of an iteration without them."""
    return f"{100 * part / (whole - part):.1f} %"
