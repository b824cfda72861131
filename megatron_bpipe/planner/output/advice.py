"""One sentence: use BPipe or not, what it should bring, how sure that is.  MFU in per cent."""

from __future__ import annotations

from megatron_bpipe.planner.search import Found, Plan
from megatron_bpipe.planner.uncertainty import Uncertainty

ALONE = ("1F1B", "interleaved")
BALANCED = ("BPipe", "interleaved BPipe")


def gain_of_bpipe(found: Found) -> float | None:
    """MFU points of the best BPipe plan over the best without; None where there are not both."""
    with_it, without = found.best_of(*BALANCED), found.best_of(*ALONE)
    return with_it.mfu - without.mfu if with_it and without else None


def advice(found: Found, unsure: Uncertainty, extrapolated: bool) -> str:
    """The sentence; ``extrapolated``: the plans lie outside the runs that the error is from."""
    with_it, without = found.best_of(*BALANCED), found.best_of(*ALONE)
    error = f"{'at least ' if extrapolated else ''}+-{unsure.gain:.1f}"
    if with_it is None and without is None:
        return "Nothing fits on this cluster, with BPipe or without: use more or larger GPUs."
    if with_it is None:
        return (
            "Do not use BPipe: nothing fits with it that does not fit faster without."
            if _everything_fits(found)
            else "Do not use BPipe: no plan that needs it fits."
        )
    if without is None:
        return f"Use BPipe: nothing fits without it; it should reach {with_it.mfu:.1f} % MFU."
    gain = with_it.mfu - without.mfu
    if gain > unsure.gain:
        return (
            f"Use BPipe: it should bring {gain:+.1f} points of MFU ({error}) over "
            f"{_short(without)}."
        )
    if gain > 0:
        return (
            f"BPipe may bring {gain:+.1f} points of MFU over {_short(without)}, less than what is "
            f"uncertain ({error}): measure both before you adopt it."
        )
    return (
        f"Do not use BPipe: its best plan is {-gain:.1f} points of MFU ({error}) below "
        f"{_short(without)}."
    )


def _everything_fits(found: Found) -> bool:
    return not any(large.candidate.run.bpipe for large in found.too_large)


def _short(plan: Plan) -> str:
    run = plan.candidate.run
    return f"{plan.way} with micro-batch {run.micro_batch} and attention {run.attention!r}"
