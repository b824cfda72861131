"""The bar for the refined estimate: equation 3 times a constant, and another one with BPipe.

Units: MFU in per cent.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_bpipe.estimate.paper.equations import equation_3
from megatron_bpipe.estimate.paper.refined import Measured


def multipliers_leave_one_out(cases: Sequence[Measured]) -> tuple[float, ...]:
    """Each run's MFU from multipliers fitted (as means of ratios) on all other runs."""
    return tuple(_predict([*cases[:i], *cases[i + 1 :]], case) for i, case in enumerate(cases))


def multipliers_fitted(cases: Sequence[Measured]) -> tuple[float, ...]:
    """Each run's MFU from multipliers fitted on all runs, itself included."""
    return tuple(_predict(cases, case) for case in cases)


def _predict(known: Sequence[Measured], case: Measured) -> float:
    plain = statistics.mean(k.mfu / _equation(k) for k in known if not k.run.bpipe)
    bpipe = statistics.mean(k.mfu / _equation(k) / plain for k in known if k.run.bpipe)
    return _equation(case) * plain * (bpipe if case.run.bpipe else 1)


def _equation(case: Measured) -> float:
    run = case.run
    return equation_3(case.stage_mfu, run.micro_batch, run.global_batch, run.layout.pp)
