"""How far off predictions were on the paper's ten runs, each predicted by the other nine.

That is the only measure there is: what lies outside those runs (other GPUs, more replicas, other
ways to run a pipeline) may be further off, and is marked as extrapolated.

Units: MFU in per cent, points of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.estimate.paper.published import DECISIONS, EXPERIMENTS
from megatron_bpipe.estimate.paper.refined import fit, predict_mfu
from megatron_bpipe.estimate.paper.tables import published_cases
from megatron_bpipe.estimate.time.layer_model import left_out


@dataclass(frozen=True)
class Uncertainty:
    """Worst distance of a predicted MFU, and of a predicted gain by BPipe, in points."""

    mfu: float
    gain: float


@lru_cache(maxsize=2)
def uncertainty(*, stages_measured: bool) -> Uncertainty:
    """With stage times as measured (table 5, a profile), or from the model of a layer."""
    predicted = predictions(stages_measured=stages_measured)
    published = {e.id: e.mfu for e in EXPERIMENTS}
    gains = [
        abs((predicted[y] - predicted[x]) - (published[y] - published[x])) for x, y in DECISIONS
    ]
    return Uncertainty(max(abs(predicted[i] - mfu) for i, mfu in published.items()), max(gains))


def predictions(*, stages_measured: bool) -> dict[int, float]:
    """MFU of each of the ten runs by its number, with every constant fitted on the other nine."""
    cases = published_cases()
    ratios = (1.0,) * len(cases) if stages_measured else left_out(cases)
    out = {}
    for i, (experiment, ratio) in enumerate(zip(EXPERIMENTS, ratios, strict=True)):
        constants = fit([*cases[:i], *cases[i + 1 :]])
        case = replace(cases[i], stage_mfu=cases[i].stage_mfu / ratio)
        out[experiment.id] = predict_mfu(case, constants)
    return out
