"""When a pipeline without a flush is flushed all the same.

Before whatever needs the training state as it stands after an iteration: evaluation, a checkpoint,
an exit, the end of training, an iteration with another number of micro-batches.  These are known
beforehand, and no forward runs ahead of them.  What is not known (a signal, an exit after so
many minutes) finds the pipeline full: then what has run ahead is thrown away (`Pipeline.discard`).
Either way the state is the same, so that a resumed run equals one that was not interrupted.
"""

from __future__ import annotations

from typing import Any


def calls_left(training: Any, far: int) -> int:
    """How many iterations after the one that runs the pipeline is flushed; at most ``far``.

    Args:
        training: Megatron's module of the loop; of its arguments ``curr_iteration`` says how many
            iterations are over.
        far: more iterations than that make no difference.
    """
    args = training.get_args()
    following = args.curr_iteration + 1
    alike = _iterations_alike(training, args.consumed_train_samples, far)
    return next((n for n in range(alike) if _flushed_after(args, following + n)), alike)


def _iterations_alike(training: Any, consumed: int, far: int) -> int:
    """How many iterations after this one have as many micro-batches; at most ``far``."""
    count = training.get_num_microbatches()
    ahead = consumed
    try:
        for iteration in range(far):
            ahead += training.get_current_global_batch_size()
            training.update_num_microbatches(ahead, consistency_check=False)
            if training.get_num_microbatches() != count:
                return iteration
        return far
    finally:
        training.update_num_microbatches(consumed, consistency_check=False)


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
