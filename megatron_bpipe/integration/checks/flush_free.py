"""Whether a schedule without a flush can run with the arguments (refusals: ``estimate``).

Such a schedule has forwards of the next iterations behind it when an optimizer steps, and several
versions of the weights.
"""

from __future__ import annotations

from typing import Any

from megatron_bpipe.estimate.refusals import WITHOUT_FLUSH
from megatron_bpipe.integration.checks.refused import given
from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.options import Options
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE

OPTIMIZERS = ("adam", "sgd")
RERUN = "disabled"


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
    if optimizer not in OPTIMIZERS:
        abort(
            f"--bpipe-schedule {name} cannot run with --optimizer {optimizer}: it was made for "
            f"optimizers that change each parameter in place; use {' or '.join(OPTIMIZERS)}"
        )
    rerun = getattr(args, "rerun_mode", RERUN)
    if rerun != RERUN:
        abort(
            f"--bpipe-schedule {name} cannot run with --rerun-mode {rerun}: an iteration cannot be "
            f"run again when the next has begun; use --rerun-mode {RERUN}"
        )
    if options.bpipe:
        abort(
            f"--bpipe-schedule {name} cannot be balanced yet; leave --bpipe out, the schedule runs "
            "without it"
        )
    if count is not None:
        try:
            flush_free.run(args.pipeline_model_parallel_size, count, 2)
        except ValueError as error:
            abort(f"--bpipe-schedule {name} does not fit --global-batch-size: {error}")
