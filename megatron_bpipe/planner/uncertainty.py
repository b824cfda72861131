"""How far off predictions are, where that can be known.

On the re-evaluation's ten runs, each predicted with what was fitted on the other nine: with its
stage times everything, with the model of a layer what BPipe costs and nothing else. On other
published runs, of which nothing was fitted: ``KNOWN``, what ``plan --check`` prints.

Units: MFU in per cent, points of it; shares of what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.estimate.memory.activations import MEGATRON_2023
from megatron_bpipe.estimate.paper.published import DECISIONS, EXPERIMENTS
from megatron_bpipe.estimate.paper.refined import fit, predict_mfu
from megatron_bpipe.estimate.paper.tables import published_cases
from megatron_bpipe.estimate.time.flops import equation_1, mfu_percent
from megatron_bpipe.planner.evaluate import place, seconds_of
from megatron_bpipe.planner.inputs.cluster import preset
from megatron_bpipe.planner.inputs.sources import from_layer_model


@dataclass(frozen=True)
class Uncertainty:
    """Worst distance of a predicted MFU, and of a predicted gain by BPipe, in points."""

    mfu: float
    gain: float


@dataclass(frozen=True)
class KnownError:
    """Distance from published runs, as shares: mean and worst of seconds and of memory."""

    runs: int
    seconds_mean: float
    seconds_worst: float
    memory_mean: float
    memory_worst: float


KNOWN = KnownError(94, 0.0557, 0.2292, 0.0151, 0.1362)
"""What ``plan --check`` prints (a test holds it to that)."""


STAGES_MEASURED, MODELLED = Uncertainty(1.55, 1.54), Uncertainty(6.57, 3.81)
"""What ``measured_uncertainty`` gives (a test holds it to that)."""


def uncertainty(*, stages_measured: bool) -> Uncertainty:
    """With stage times as measured (table 5, a profile), or from the model of a layer."""
    return STAGES_MEASURED if stages_measured else MODELLED


@lru_cache(maxsize=2)
def measured_uncertainty(*, stages_measured: bool) -> Uncertainty:
    """The same, computed."""
    predicted = predictions(stages_measured=stages_measured)
    published = {e.id: e.mfu for e in EXPERIMENTS}
    gains = [
        abs((predicted[y] - predicted[x]) - (published[y] - published[x])) for x, y in DECISIONS
    ]
    return Uncertainty(max(abs(predicted[i] - mfu) for i, mfu in published.items()), max(gains))


def predictions(*, stages_measured: bool) -> dict[int, float]:
    """MFU of each of the ten runs by its number, with every constant fitted on the other nine."""
    cases = published_cases()
    out = {}
    for i, experiment in enumerate(EXPERIMENTS):
        constants = fit([*cases[:i], *cases[i + 1 :]])
        if stages_measured:
            out[experiment.id] = predict_mfu(cases[i], constants)
            continue
        run = experiment.run()
        predictor = replace(from_layer_model(2, 0, MEGATRON_2023), bpipe=constants.bpipe)
        cluster = preset(A100_80G.name, run.layout.gpus)
        seconds = seconds_of(place(run, cluster, predictor), predictor)
        flops = equation_1(run.model, run.global_batch)
        out[experiment.id] = mfu_percent(flops, seconds, 1, cluster.peak)
    return out
