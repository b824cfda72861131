"""When a pipeline without a flush is flushed all the same.

Before whatever needs the training state as it stands after an iteration: evaluation, a checkpoint,
an exit, the end of training; and after every iteration while the batch size ramps up.  These are
known beforehand, and no forward runs ahead of them.  What is not known (a signal, an exit after so
many minutes) finds the pipeline full: then what has run ahead is thrown away (`Pipeline.discard`).
Either way the state is the same, so that a resumed run equals one that was not interrupted.
"""

from __future__ import annotations

from typing import Any


def calls_left(args: Any, batch_size: int, far: int) -> int:
    """How many iterations after the one that runs the pipeline is flushed; at most ``far``.

    Args:
        args: Megatron's; ``curr_iteration`` iterations are over.
        batch_size: of the iteration that runs.
        far: more iterations than that make no difference.
    """
    if batch_size != args.global_batch_size:  # it ramps up: the next one may be larger
        return 0
    following = args.curr_iteration + 1
    return next((left for left in range(far) if _flushed_after(args, following + left)), far)


def _flushed_after(args: Any, iteration: int) -> bool:
    """Whether something needs the state after this many iterations."""
    intervals = [args.exit_interval]
    if getattr(args, "do_valid", False):
        intervals.append(args.eval_interval)
    if args.save:
        intervals += [args.save_interval, getattr(args, "non_persistent_save_interval", None)]
    ends = getattr(args, "phase_transition_iterations", None) or []
    return (
        iteration >= args.train_iters
        or iteration in ends
        or any(interval and iteration % interval == 0 for interval in intervals)
    )
