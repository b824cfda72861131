"""Use BPipe or not, what it should bring, how sure that is; and whether another schedule wins.

Units: MFU in per cent, seconds of an iteration, GiB of the fullest GPU.
"""

from __future__ import annotations

from megatron_bpipe.planner.search import Found, Plan
from megatron_bpipe.planner.uncertainty import Uncertainty

ALONE = ("1F1B", "interleaved")
BALANCED = ("BPipe", "interleaved BPipe")
APART = ("ZB-H1", "BPipe on ZB-H1", "V-Half", "V-Min", "V-ZB")
"""Ways that compute weight gradients apart."""


def gain_of_bpipe(found: Found) -> float | None:
    """MFU points of the best BPipe plan over the best without; None where there are not both."""
    with_it, without = found.best_of(*BALANCED), found.best_of(*ALONE)
    return with_it.mfu - without.mfu if with_it and without else None


def advice(found: Found, unsure: Uncertainty, extrapolated: bool) -> str:
    """A sentence on BPipe, and one on the ways that compute weight gradients apart.

    ``extrapolated``: the plans lie outside the runs that the error is from.
    """
    own = _of_bpipe(found, unsure, extrapolated)
    apart = found.best_of(*APART)
    if apart is None:
        return own
    other = found.best_of(*ALONE, *BALANCED, "host offload")
    if other is None:
        return f"Use {_short(apart)}, {_needs(apart)}: nothing else fits. {UNTRIED}"
    gain = apart.mfu - other.mfu
    compared = f"{_short(apart)} should take {_needs(apart)}, {_short(other)} {_needs(other)}"
    if gain > unsure.gain and other.way in BALANCED:
        return f"Do not use BPipe: {compared}. {UNTRIED} Of Megatron's own schedules: {own}"
    if gain > unsure.gain:
        return f"{own} {compared}. {UNTRIED}"
    if gain > 0:
        return f"{own} {compared}, less apart than what is uncertain. {UNTRIED}"
    return f"{own} Weight gradients apart bring nothing: {compared}."


UNTRIED = "No run on a GPU stands behind the former: measure both before you adopt it."


def _of_bpipe(found: Found, unsure: Uncertainty, extrapolated: bool) -> str:
    """BPipe against Megatron's own schedules without it."""
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


def _needs(plan: Plan) -> str:
    return f"{plan.seconds:.3g} s an iteration and {plan.memory.fullest:.1f} GiB"
