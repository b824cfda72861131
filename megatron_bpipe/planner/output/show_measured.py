"""What a measured run says, as text and as data.  Units: MiB in text, bytes in data."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.placement.columns import columns
from megatron_bpipe.planner.measured import (
    MIB,
    MeasuredRun,
    Proposal,
    best,
    measured_balance,
    proposals,
    recomputed_shares,
)
from megatron_bpipe.schedule.balancing.lending import LimitError
from megatron_bpipe.schedule.ops import HOST


def capacity_of(run: MeasuredRun, given: int | None) -> int | None:
    """What each stage has: as given, else the smallest GPU of the run; None on a CPU."""
    devices = [stage.device for stage in run.stages if stage.device is not None]
    return given if given is not None else min(devices, default=None)


def text(run: MeasuredRun, capacity: int | None, micro_batches: int | None) -> str:
    """Tightest stage, room, and what to change."""
    found = proposals(run, micro_batches)
    tight, empty, totals = run.tightest, run.emptiest, run.totals
    lines = [
        _table(run, capacity),
        "",
        f"tightest: stage {tight} with {totals[tight] / MIB:.1f} MiB, "
        f"{_largest_part(run, tight)}; most room: stage {empty} with {totals[empty] / MIB:.1f} MiB",
        "",
        "peak of each stage, MiB, as this run's figures and the schedule give it",
        columns([("stock 1F1B" if q.budget is None else f"--bpipe-budget {q.budget}",
                  " ".join(f"{t / MIB:.1f}" for t in q.totals),
                  f"fullest: stage {q.tightest}") for q in found]),
        "",
        _budget_line(best(found, capacity), found[0], capacity),
        _measured_line(run, capacity, micro_batches),
    ]  # fmt: skip
    lines.append(_recompute_line(run, _target(found, capacity), capacity is not None))
    return "\n".join(lines)


def data(run: MeasuredRun, capacity: int | None, micro_batches: int | None) -> dict[str, object]:
    """The same for JSON, in bytes."""
    found = proposals(run, micro_batches)
    target = _target(found, capacity)
    return {
        "stages": [vars(stage) | {"total": stage.total} for stage in run.stages],
        "tightest": run.tightest,
        "most_room": run.emptiest,
        "capacity": capacity,
        "proposals": [{"budget": q.budget, "totals": q.totals} for q in found],
        "budget": best(found, capacity).budget,
        "measured": _measured_data(run, capacity, micro_batches),
        "recompute_target": target,
        "recomputed_shares": recomputed_shares(run, target),
    }


def _target(found: Sequence[Proposal], capacity: int | None) -> int:
    """What recomputation has to reach: the memory there is, else what the best budget needs."""
    return capacity if capacity is not None else _lowest(found)


def _lowest(found: Sequence[Proposal]) -> int:
    """The fullest stage's peak under the best budget."""
    return min(max(q.totals) for q in found)


def _table(run: MeasuredRun, capacity: int | None) -> str:
    head = ["stage", "static", "activations", "lent pool", "working", "total", "a micro-batch"]
    rows: list[tuple[str, ...]] = [(*head, "room") if capacity is not None else tuple(head)]
    for x, stage in enumerate(run.stages):
        parts = (
            *(stage.static, stage.own, stage.pool, stage.working, stage.total),
            stage.micro_batch,
        )
        cells = [str(x), *(f"{part / MIB:.1f}" for part in parts)]
        if capacity is not None:
            cells.append(f"{(capacity - stage.total) / MIB:.1f}")
        rows.append(tuple(cells))
    return columns(rows)


def _largest_part(run: MeasuredRun, x: int) -> str:
    stage = run.stages[x]
    parts = {
        "parameters and optimizer": stage.static,
        "activations": stage.own,
        "the pool it lends": stage.pool,
        "what computing needs (logits on the last stage)": stage.working,
    }
    return f"most of it {max(parts, key=lambda name: parts[name])}"


def _budget_line(choice: Proposal, stock: Proposal, capacity: int | None) -> str:
    before, after = max(stock.totals) / MIB, max(choice.totals) / MIB
    if choice.budget is None:
        why = "fits" if capacity is not None and max(stock.totals) <= capacity else "is lowest"
        return f"budget: none; stock 1F1B {why} with {before:.1f} MiB on stage {stock.tightest}"
    missing = ""
    if capacity is not None and max(choice.totals) > capacity:
        missing = f"; still {after - capacity / MIB:.1f} MiB too many"
    return (
        f"budget: --bpipe --bpipe-budget {choice.budget} takes the fullest stage from "
        f"{before:.1f} to {after:.1f} MiB{missing}"
    )


def _measured_line(run: MeasuredRun, capacity: int | None, micro_batches: int | None) -> str:
    """What ``--bpipe-balance measured`` would do."""
    flags = "--bpipe --bpipe-balance measured"
    if capacity is not None:
        flags += f" --bpipe-memory-limit {capacity / MIB:.0f}MiB"
    try:
        found = measured_balance(run, capacity, micro_batches)
    except LimitError as error:
        more = (error.least - error.limit) / MIB
        return f"measured: {flags} cannot be kept, stage {error.stage} needs {more:.1f} MiB more"
    peaks = " ".join(f"{peak / MIB:.1f}" for peak in found.peaks)
    if not found.loans:
        return f"measured: {flags} would move nothing: {peaks}"
    loans = ", ".join(
        f"stage {loan.evictor} -> {'host' if loan.lender == HOST else loan.lender} ({loan.slots})"
        for loan in found.loans
    )
    return (
        f"measured: {flags} comes to {peaks}, fullest: stage {found.fullest}; {loans} activations "
        f"at a time, {found.moved / MIB:.1f} MiB leave in an iteration"
    )


def _measured_data(
    run: MeasuredRun, capacity: int | None, micro_batches: int | None
) -> dict[str, object]:
    try:
        found = measured_balance(run, capacity, micro_batches)
    except LimitError as error:
        return {"limit": error.limit, "least": error.least, "stage": error.stage}
    loans = [(loan.evictor, loan.lender, loan.slots) for loan in found.loans]
    return {"loans": loans, "peaks": found.peaks, "moved": found.moved, "proved": found.proved}


def _recompute_line(run: MeasuredRun, target: int, is_capacity: bool) -> str:
    shares = recomputed_shares(run, target)
    aim = (
        f"to fit {target / MIB:.1f} MiB" if is_capacity else f"for the same {target / MIB:.1f} MiB"
    )
    if max(shares) == 0:
        return f"recompute: nothing {aim} without BPipe"
    if max(shares) > 1:
        worst = shares.index(max(shares))
        return f"recompute: not enough {aim}: stage {worst} needs more than its activations"
    shown = ", ".join(f"{share:.0%} of stage {x}" for x, share in enumerate(shares) if share > 0)
    return (
        f"recompute: {aim} without BPipe, whole layers of {shown} (Megatron has one number for all "
        "stages: --recompute-granularity full --recompute-method block --recompute-num-layers N)"
    )
