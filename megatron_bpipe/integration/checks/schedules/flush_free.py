"""Whether a schedule without a flush can run with the arguments (refusals: ``estimate``).

Such a schedule has forwards of the next iterations behind it when an optimizer steps, and several
versions of the weights.
"""

from __future__ import annotations

from typing import Any

from megatron_bpipe.estimate.refusals import IN_PLACE, RERUN, WITHOUT_FLUSH
from megatron_bpipe.integration.checks.refused import given
from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.options import Options
from megatron_bpipe.schedule.balancing.balance import BudgetError
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec
from megatron_bpipe.schedule.flush_free.plan import short_runs
from megatron_bpipe.schedule.ops import Kind, quantity
from megatron_bpipe.schedule.validation.occupancy import peak


def check_flush_free(args: Any, options: Options, count: int | None) -> None:
    """Stop unless a schedule without a flush can run with the arguments.

    Args:
        args: Megatron's, parsed but not yet validated.
        options: the user's settings.
        count: micro-batches of an iteration, None where the arguments do not fix it.

    Raises:
        Abort: it cannot; rank 0 has said which flag, its value and the reason.
    """
    name = options.schedule
    flush_free = CATALOGUE[name].without_flush if name is not None else None
    if flush_free is None:
        return
    for flag, value, why in given(args, WITHOUT_FLUSH):
        abort(f"--bpipe-schedule {name} cannot run with {flag} {value}: {why}")
    optimizer = getattr(args, "optimizer", "adam")
    if optimizer not in IN_PLACE:
        abort(
            f"--bpipe-schedule {name} cannot run with --optimizer {optimizer}: it was made for "
            f"optimizers that change each parameter in place; use {' or '.join(IN_PLACE)}"
        )
    rerun = getattr(args, "rerun_mode", RERUN)
    if rerun != RERUN:
        abort(
            f"--bpipe-schedule {name} cannot run with --rerun-mode {rerun}: an iteration cannot be "
            f"run again when the next has begun; use --rerun-mode {RERUN}"
        )
    if options.bpipe and options.parts not in (None, 1):
        abort(
            f"--bpipe-schedule {name} does not run with --bpipe-parts {options.parts}: what "
            "leaves in one iteration and returns in another travels whole; leave --bpipe-parts out"
        )
    if count is not None:
        try:
            flush_free.run(args.pipeline_model_parallel_size, count, 2)
        except ValueError as error:
            abort(f"--bpipe-schedule {name} does not fit --global-batch-size: {error}")


def check_balance(args: Any, options: Options, count: int | None) -> str | None:
    """Whether such a schedule can keep the budget, in the steady state and in every short run.

    Args:
        args: Megatron's, parsed but not yet validated.
        options: the user's settings, a schedule without a flush among them.
        count: micro-batches of an iteration, None where the arguments do not fix it.

    Returns:
        None, or a sentence if there is nothing to balance.

    Raises:
        Abort: it cannot; rank 0 has said the least budget.
    """
    assert options.schedule is not None
    p = args.pipeline_model_parallel_size
    m = count or (1 if options.schedule == "pipedream" else p)
    # equal to the one that will run, so that what is planned here need not be planned again
    spec = ScheduleSpec(options.schedule, p, m, chunks=1, balanced=True, budget=options.budget)
    try:
        runs = short_runs(spec)
    except BudgetError as error:
        abort(
            f"--bpipe-schedule {options.schedule} cannot keep --bpipe-budget "
            f"{quantity(error.budget)} on {p} stages: the least is {quantity(error.least)}; raise "
            "it or leave the flag out"
        )
    if any(op.kind is Kind.EVICT for run in runs for line in run.stages for op in line):
        return None
    held = max(peak(line) for run in runs for line in run.stages)
    why = f"--bpipe-budget is {quantity(options.budget)}" if options.budget else f"p = {p}"
    return (
        f"nothing to balance: {why} and {options.schedule} never holds more than {held} "
        "micro-batches; it runs as it is"
    )
