"""Whether two pipelines in opposite directions can run with the arguments.

``estimate.refusals`` has the flags that they cannot run with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_bpipe.estimate.refusals import BOTH_WAYS, IN_PLACE
from megatron_bpipe.integration.checks.refused import check_given, check_there
from megatron_bpipe.integration.log import abort
from megatron_bpipe.integration.options import Options

# attribute of Megatron's arguments: the flag of a size that has to be 1
ALONE = {
    "context_parallel_size": "--context-parallel-size",
    "tensor_parallel_num_weight_shards": "--tensor-parallel-num-weight-shards",
}


def check_both_ways(args: Any, options: Options, count: int | None) -> None:
    """Look at Megatron's parsed arguments.

    Args:
        args: not yet validated by Megatron.
        options: the user's settings.
        count: micro-batches of an iteration, None where the arguments do not fix it.

    Raises:
        Abort: Chimera cannot run with one; rank 0 has said which, and why.
    """
    schedule = options.schedule
    assert schedule is not None
    check_given(args, schedule, BOTH_WAYS)
    for name, flag in ALONE.items():
        size = getattr(args, name, None) or 1
        if size > 1:
            abort(
                f"--bpipe-schedule {schedule} cannot run with {flag} {size}: gradients would be "
                "averaged over groups of two kinds; drop one"
            )
    optimizer = getattr(args, "optimizer", "adam")
    if optimizer not in IN_PLACE:
        abort(
            f"--bpipe-schedule {schedule} cannot run with --optimizer {optimizer}: it was made for "
            f"{' and '.join(IN_PLACE)}; use one of them"
        )
    if getattr(args, "save", None) or getattr(args, "load", None):
        _check_checkpoints(args, schedule)
    if options.bpipe:
        abort(
            f"--bpipe cannot balance --bpipe-schedule {schedule}: both ends of a pair hold two "
            "copies of the model and as many micro-batches; drop --bpipe"
        )
    if getattr(args, "dataloader_type", None) == "external":
        abort(
            f"--bpipe-schedule {schedule} cannot run with --dataloader-type external: each "
            "direction needs a sampler of its own; use single or cyclic"
        )
    p = args.pipeline_model_parallel_size
    if p % 2 or p < 4:
        abort(
            f"--bpipe-schedule {schedule} needs an even number of stages, 4 or more, but "
            f"--pipeline-model-parallel-size is {p}; use {max(4, p + p % 2)}"
        )
    for flag, size, of in _batches(args, count):
        if of % p:
            abort(
                f"--bpipe-schedule {schedule} needs a multiple of {p} micro-batches, but "
                f"{flag} {size} makes {of}; change it"
            )
    check_there(schedule, "both_ways")


def _check_checkpoints(args: Any, schedule: str) -> None:
    """Formats that find a part of the model by something else than its stage are not used."""
    form = getattr(args, "ckpt_format", "torch")
    if form not in ("torch", "torch_dist"):
        abort(
            f"--bpipe-schedule {schedule} cannot run with --ckpt-format {form}: only torch and "
            "torch_dist were tried; use one of them"
        )
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        abort(
            f"--bpipe-schedule {schedule} cannot run with --non-persistent-ckpt-type local: it "
            "keeps each rank's own part, and the copy that goes up would load it; use global"
        )


def _batches(args: Any, count: int | None) -> Iterator[tuple[str, int, int]]:
    """Flag, value and micro-batches of an iteration that trains or validates, where known."""
    if count is None:
        return
    train = args.global_batch_size
    yield "--global-batch-size", train, count
    valid = getattr(args, "eval_global_batch_size", None)
    if valid:
        micro = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
        copies = train // (args.micro_batch_size * count)
        yield "--eval-global-batch-size", valid, valid // (micro * copies)
