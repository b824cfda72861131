"""The re-evaluation's estimate of a pipeline's MFU from that of a single stage (equations 2-4).

Notation of table 4: T(b) is forward plus backward of one micro-batch in one stage, F the FLOPs of
the model and F_stage those of one stage, both for the whole batch B.

How equations 2 and 3 are read here.  It defines MFU_stage(b) = (1/P) b F_stage / (B T(b)),
so P is the peak of the GPUs of *one stage* (t of them).  Equation 2, MFU(b) = (1/P) F /
((B/b + p - 1) T(b)), divides the FLOPs of all stages by that same P; the whole model runs on p
times as many GPUs, so it is a factor p too large, and equation 3 inherits F / F_stage = p::

    as printed   MFU(b) = p MFU_stage(b) / (1 + (p-1) b/B)      378 % for row 8 of table 3
    as read      MFU(b) =   MFU_stage(b) / (1 + (p-1) b/B)      49.8 %, published 45.8 %

Equation 4 is a ratio: the factor cancels, it is right as printed.

Units: MFU in per cent; micro-batch b and batch B in sequences.
"""

from __future__ import annotations

from megatron_bpipe.estimate.errors import EstimateError


def equation_3(stage_mfu: float, b: int, batch: int, p: int) -> float:
    """MFU of the whole pipeline from that of one stage: only the bubble is taken off.

    Raises EstimateError for sizes below 1 or b above B.
    """
    _check(b, batch, p)
    return stage_mfu / (1 + (p - 1) * b / batch)


def equation_4(stage_mfu_x: float, stage_mfu_y: float, x: int, y: int, batch: int, p: int) -> float:
    """MFU(x) / MFU(y): the speed-up of going from micro-batch y to micro-batch x.

    Raises EstimateError for sizes below 1 or micro-batches above B.
    """
    _check(x, batch, p)
    _check(y, batch, p)
    return (batch + y * (p - 1)) / (batch + x * (p - 1)) * stage_mfu_x / stage_mfu_y


def _check(b: int, batch: int, p: int) -> None:
    if p < 1:
        raise EstimateError(f"p is {p}: a pipeline has at least 1 stage")
    if not 1 <= b <= batch:
        raise EstimateError(f"micro-batch {b} of a batch of {batch}: must be from 1 to {batch}")
