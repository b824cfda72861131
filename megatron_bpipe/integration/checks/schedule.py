"""Which schedule the arguments ask for, and whether there is anything to balance in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_bpipe.integration.checks.schedules.chimera import check_both_ways
from megatron_bpipe.integration.checks.schedules.flush_free import check_balance
from megatron_bpipe.integration.checks.schedules.split_backward import check_split_backward
from megatron_bpipe.integration.checks.schedules.v_placement import check_v_placement
from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.options import MEASURED, Options
from megatron_bpipe.schedule.balancing.balance import BudgetError
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, EXECUTED, ScheduleSpec, make
from megatron_bpipe.schedule.ops import Kind, Schedule, microbatches, quantity
from megatron_bpipe.schedule.validation.occupancy import peak

CHUNKS_FLAG = "--num-virtual-stages-per-pipeline-rank"


def schedule_name(chosen: str | None, chunks: int) -> str:
    """The user's schedule, or Megatron's own for this number of model chunks a stage."""
    return chosen or ("interleaved" if chunks > 1 else "1f1b")


def both_ways(chosen: str | None) -> bool:
    """Whether a second pipeline goes up, with its own copy of the model."""
    return chosen is not None and CATALOGUE[chosen].both_ways


def check_schedule(args: Any, options: Options, count: int | None) -> str | None:
    """Whether the schedule fits the arguments and its budget can be kept.

    Args:
        args: Megatron's, parsed but not yet validated.
        options: the user's settings.
        count: micro-batches of an iteration, None where the arguments do not fix it.

    Returns:
        None, or a sentence if there is nothing to balance.

    Raises:
        Abort: it does not fit; rank 0 has said which flag, its value and the remedy.
    """
    chunks = model_chunks(args)
    _check_name(options.schedule, chunks)
    if options.schedule is not None and CATALOGUE[options.schedule].v_placed:
        check_v_placement(args, options.schedule)
    if both_ways(options.schedule):
        check_both_ways(args, options, count)
    if options.schedule is not None and CATALOGUE[options.schedule].splits_backward:
        check_split_backward(args, options.schedule)
    if not options.bpipe:
        return None
    measured = options.balance == MEASURED
    if measured:
        _check_measured(options.schedule)
    if options.schedule is not None and CATALOGUE[options.schedule].without_flush is not None:
        return check_balance(args, options, count)
    _check_parts(options)
    p = args.pipeline_model_parallel_size
    group = getattr(args, "microbatch_group_size_per_vp_stage", None) if chunks > 1 else None
    spec = ScheduleSpec(
        schedule_name(options.schedule, chunks), p, count or 4 * (group or p), chunks, group
    )
    try:
        base = make(spec)
    except ValueError:
        return None  # sizes that Megatron itself refuses, in its own words
    held = microbatches(max(peak(line) for line in base.stages), chunks)
    balanced_spec = replace(spec, balanced=True, budget=options.budget, parts=options.in_parts)
    try:
        balanced = make(balanced_spec)
    except BudgetError as error:
        if options.budget is None and measured:
            return None  # bytes may differ where counts do not
        if options.budget is None:
            return f"nothing to balance: {base.name} is as full on every stage; it runs as it is"
        abort(
            f"--bpipe-budget {quantity(options.budget)} is too small for {p} stages"
            f"{f' of {chunks} chunks' if chunks > 1 else ''}"
            f"{f', in {options.in_parts} parts' if options.in_parts > 1 else ''}: the least is "
            f"{quantity(error.least)}; raise it or leave the flag out (default {_default(spec)})"
        )
    if measured or _evicts(balanced):
        return None
    why = f"--bpipe-budget is {quantity(options.budget)}" if options.budget else f"p = {p}"
    stock = "1F1B" if chunks == 1 else f"interleaved 1F1B of {chunks} chunks"
    runs = "the stock schedule runs" if options.schedule is None else "it runs as it is"
    return (
        f"nothing to balance: {why} and {options.schedule or stock} never holds more than "
        f"{quantity(held)} micro-batches; {runs}"
    )


def _check_parts(options: Options) -> None:
    if options.in_parts < 1:
        abort(
            f"--bpipe-parts {options.parts}: an activation has at least 1 part; use 1 to move it "
            "whole, or leave the flag out"
        )
    if options.in_parts > 1 and options.balance == MEASURED:
        abort(
            f"--bpipe-parts {options.parts} does not run with --bpipe-balance measured, which "
            "moves whole activations; leave --bpipe-parts out"
        )


def _check_measured(chosen: str | None) -> None:
    """Whether loans can change after the first iteration of this schedule."""
    entry = CATALOGUE[chosen] if chosen is not None else None
    if entry is not None and (entry.v_placed or entry.without_flush is not None):
        why = "balances by its placement" if entry.v_placed else "never empties its pools"
        abort(
            f"--bpipe-balance measured does not run with --bpipe-schedule {chosen}, which {why}; "
            "use --bpipe-balance paper"
        )


def _check_name(chosen: str | None, chunks: int) -> None:
    if chosen is None:
        return
    if chosen not in EXECUTED:
        abort(f"--bpipe-schedule {chosen} is unknown; choose one of {', '.join(EXECUTED)}")
    wanted = CATALOGUE[chosen].chunks
    if chunks != wanted if wanted is not None else chunks == 1:
        remedy = f"drop {CHUNKS_FLAG}" if wanted == 1 else f"give {CHUNKS_FLAG} {wanted or 2}"
        abort(
            f"--bpipe-schedule {chosen} does not fit a model of {chunks} chunk(s) a stage; "
            f"{remedy}, or leave --bpipe-schedule out"
        )


def _default(spec: ScheduleSpec) -> str:
    budget = make(replace(spec, balanced=True)).budget
    assert budget is not None
    return quantity(budget)


def _evicts(schedule: Schedule) -> bool:
    return any(op.kind is Kind.EVICT for line in schedule.stages for op in line)


def model_chunks(args: Any) -> int:
    """Model chunks a stage (v), as Megatron's ``validate_args`` will find it."""
    p = args.pipeline_model_parallel_size
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    given = getattr(args, "num_virtual_stages_per_pipeline_rank", None)
    layers = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    if layout is not None:
        return max(1, _stages_of_layout(layout) // p)
    if given is not None:
        return int(given)
    if layers is not None and args.num_layers is not None:
        extra = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        total = args.num_layers + sum(bool(getattr(args, name, False)) for name in extra)
        return max(1, int(total // p // layers))
    return 1


def _stages_of_layout(layout: Any) -> int:
    if not isinstance(layout, str):
        return len(layout)
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    return int(PipelineParallelLayerLayout.get_num_stages_from_str(layout))
