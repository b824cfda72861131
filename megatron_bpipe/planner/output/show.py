"""Plans as text and as plain data.  Units: MFU in per cent, GiB, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.scheduled import schedule_of
from megatron_bpipe.placement.columns import columns
from megatron_bpipe.planner.evaluate import Memory
from megatron_bpipe.planner.search import Found, Plan, TooLarge
from megatron_bpipe.planner.ways import way_of
from megatron_bpipe.schedule.ops import quantity


def plans_table(plans: Sequence[Plan]) -> str:
    """A line for each plan, then peak memory by stage."""
    rows: list[tuple[str, ...]] = [
        ("", "way", "t", "p", "d", "b", "attention", "layers a stage", "MFU %", "s", "GiB", "fits")
    ]
    for number, plan in enumerate(plans, 1):
        run, memory = plan.candidate.run, plan.memory
        rows.append(
            (
                str(number),
                way_text(run),
                *map(str, (run.layout.tp, run.layout.pp, run.layout.dp, run.micro_batch)),
                attention_text(run),
                _layers(run),
                f"{plan.mfu:.1f}",
                f"{plan.seconds:.3g}",
                f"{memory.fullest:.1f}",
                memory.fits,
            )
        )
    return columns(rows)


def way_text(run: Run) -> str:
    """How a pipeline runs, with what that takes."""
    way = way_of(run)
    if run.chunks > 1 and not run.entry.v_placed:
        way = f"{way}, {run.chunks} chunks"
    return f"{way}, budget {quantity(_budget(run))}" if run.evicts else way


def attention_text(run: Run) -> str:
    """The attention method, and what else is recomputed."""
    recompute = run.recomputes
    if run.recompute is None or not recompute.active:
        return run.attention
    if recompute.method:
        return f"{run.attention} ({recompute.method} {recompute.layers})"
    return f"{run.attention} (recompute {' '.join(recompute.modules)})"


def memory_line(memory: Memory) -> str:
    """Peak of every stage against what its GPU has."""
    needs = " ".join(f"{need:.1f}" for need in memory.needed)
    sizes = sorted(set(memory.there))
    return f"{needs} GiB of {' and '.join(f'{size:.1f}' for size in sizes)}"


def fallen_out(found: Found) -> str:
    """Why the rest is not in the table."""
    rows: list[tuple[str, ...]] = [("does not fit", "attention", "how many", "the most promising")]
    for large in found.too_large:
        run, memory = large.candidate.run, large.memory
        tight = memory.tightest
        rows.append(
            (
                way_of(large.candidate.run),
                run.attention,
                str(large.count),
                f"t={run.layout.tp} p={run.layout.pp} b={run.micro_batch}: stage {tight} needs "
                f"{memory.needed[tight]:.1f} of {memory.there[tight]:.1f} GiB; at most "
                f"{large.most_mfu:.1f} % if it fitted",
            )
        )
    lines = [columns(rows)] if found.too_large else []
    lines.append(f"fits but slower than those shown: {found.slower}")
    lines += [f"not looked at, {count} like: {reason}" for reason, count in found.reasons.items()]
    return "\n".join(lines)


def plan_data(plan: Plan) -> dict[str, object]:
    """A plan for JSON; memory in GiB by stage."""
    run = plan.candidate.run
    return {
        "way": plan.way,
        "schedule": run.base,
        "layout": asdict(run.layout),
        "micro_batch": run.micro_batch,
        "micro_batches": run.micro_batches,
        "global_batch": run.global_batch,
        "attention": run.attention,
        "chunks": run.chunks,
        "budget": _budget(run) if run.evicts else None,
        "partition": [run.layers_of(stage) for stage in range(run.layout.pp)],
        "gpus": [gpu.name for gpu in plan.candidate.gpus],
        "seconds": plan.seconds,
        "mfu": plan.mfu,
        "peak_gib": plan.memory.needed,
        "allocated_gib": plan.memory.allocated,
        "capacity_gib": plan.memory.there,
        "fits": plan.memory.fits,
    }


def too_large_data(large: TooLarge) -> dict[str, object]:
    """A candidate that does not fit, for JSON."""
    run = large.candidate.run
    return {
        "way": way_of(large.candidate.run),
        "layout": asdict(run.layout),
        "micro_batch": run.micro_batch,
        "attention": run.attention,
        "peak_gib": large.memory.needed,
        "allocated_gib": large.memory.allocated,
        "capacity_gib": large.memory.there,
        "stage": large.memory.tightest,
        "most_mfu": large.most_mfu,
        "count": large.count,
    }


def _budget(run: Run) -> float:
    return run.budget or schedule_of(run).budget or 0.0


def _layers(run: Run) -> str:
    """Layers of each stage, or chunk of a stage; equal ones together."""
    if not run.partition:
        return str(run.layers_per_stage)
    runs: list[tuple[int, int]] = []
    for layers in run.partition:
        if runs and runs[-1][0] == layers:
            runs[-1] = layers, runs[-1][1] + 1
        else:
            runs.append((layers, 1))
    each = [str(layers) if n == 1 else f"{n} of {layers}" for layers, n in runs]
    return ", ".join(each)
