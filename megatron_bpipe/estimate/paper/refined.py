"""The refined estimate: from the MFU of a single stage to that of the pipeline.

The schedule itself is simulated, op by op, with the single stage's time and with published figures
of the GPU for what that leaves out: the output layer on the last stage, evictions and loads over
NVLink, the optimizer step, the data-parallel reduce.  Two constants are fitted:

* ``exchange``: seconds per byte of one pipeline exchange, synchronisation included.  Physics,
  fitted on the runs without BPipe only.
* ``bpipe``: seconds of the iteration lost per byte that the busiest evictor moves.  *Empirical*:
  one number from four runs.  At NVLink's speed the simulation hides every transfer behind a
  computation, so this stands for whatever BPipe cost there beyond: transfers that were not hidden
  after all, contention with tensor-parallel traffic, and that pair-adjacent placement turns most
  pipeline edges into edges between nodes.  Four rows cannot tell these apart.

Each run alone implies a value of each constant; the fit is the median of these values, which one
odd run cannot move far.  Leave-one-out predicts each run with constants fitted on all others.

How firm this is.  The form was chosen by someone who knew the ten runs, which leaving one out does
not undo.  The mean error with each run left out stays below that of two bare multipliers for any
share of the peak between 0.5 and 0.95 that the output layer may reach, for vocabularies of LLaMA up
to 100000, and with means in place of medians (tested).  Row (10) against row (9) is 0.3 points:
the sign comes out right, the size is within the error.

Units: seconds, bytes, MFU in per cent by equation 1 as printed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.activations import FUSED, Kernels, micro_batch_bytes
from megatron_bpipe.estimate.memory.parameters import stage_parameters
from megatron_bpipe.estimate.paper.stage_pace import pace_of_mfu
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.flops import equation_1, mfu_percent
from megatron_bpipe.estimate.time.iteration_time import Costs, IterationTime
from megatron_bpipe.estimate.time.scheduled import schedule_of
from megatron_bpipe.estimate.time.simulated import simulated_seconds
from megatron_bpipe.estimate.time.step_time import OPTIMIZER_BYTES
from megatron_bpipe.schedule.ops import Kind


@dataclass(frozen=True)
class Measured:
    """A run whose single stage was measured, and perhaps the whole; MFU in per cent."""

    run: Run
    gpu: Gpu
    stage_mfu: float
    mfu: float
    kernels: Kernels = FUSED


@dataclass(frozen=True)
class Constants:
    """The fitted constants, in seconds per byte; ``bpipe`` = 0 is physics alone."""

    exchange: float
    bpipe: float


def costs(case: Measured, constants: Constants) -> Costs:
    """What one micro-batch and one iteration of this run cost."""
    run, gpu = case.run, case.gpu
    pace = pace_of_mfu(run, gpu, case.stage_mfu)
    return Costs(
        stage=run.layers_per_stage * pace.layer,
        head=pace.head,
        exchange=exchange_seconds(run, constants, case.kernels),
        once=once_seconds(run, 0, gpu, gpu.network),
        exposed=constants.bpipe * bytes_moved(run, case.kernels),
        transfer=micro_batch_bytes(run, 0, case.kernels) / gpu.nvlink if run.bpipe else None,
    )


def exchange_seconds(run: Run, constants: Constants, kernels: Kernels = FUSED) -> float:
    """One send between two stages, synchronisation included."""
    size = kernels.element * run.tokens * run.model.hidden / run.layout.sp
    return constants.exchange * size


def once_seconds(run: Run, stage: int, gpu: Gpu, link: float) -> float:
    """Optimizer step and data-parallel reduce of a stage; ``link`` bytes/s between its replicas."""
    parameters = stage_parameters(run, stage).total
    replicas = run.layout.dp * run.layout.cp
    shards = replicas if run.distributed_optimizer else 1
    step = OPTIMIZER_BYTES * parameters / shards / gpu.memory_bandwidth
    return step + 2 * (replicas - 1) / replicas * 4 * parameters / link


@functools.lru_cache(maxsize=256)  # a fit asks thousands of times
def bytes_moved(run: Run, kernels: Kernels = FUSED) -> int:
    """Bytes that the busiest evictor sends and fetches in one iteration; 0 without BPipe."""
    if not run.bpipe:
        return 0
    return max(
        2
        * sum(op.kind is Kind.EVICT for op in line)
        * (micro_batch_bytes(run, stage, kernels) // run.chunks)
        for stage, line in enumerate(schedule_of(run).stages)
    )


def predict_mfu(
    case: Measured, constants: Constants, iterate: IterationTime = simulated_seconds
) -> float:
    """MFU of the whole run in per cent; ``case.mfu`` is not looked at."""
    run = case.run
    seconds = iterate(costs(case, constants), run.layout.pp, run.micro_batches)
    flops = equation_1(run.model, run.global_batch)
    return mfu_percent(flops, seconds, run.layout.gpus, case.gpu.flops)


def fit(cases: Sequence[Measured], iterate: IterationTime = simulated_seconds) -> Constants:
    """Median of the constants that the runs imply: ``exchange`` first, then ``bpipe``.

    Raises EstimateError unless there is a run without and one with BPipe.
    """
    plain = [case for case in cases if not case.run.bpipe]
    balanced = [case for case in cases if case.run.bpipe]
    if not plain or not balanced:
        raise EstimateError(
            f"{len(plain)} runs without and {len(balanced)} with BPipe: the constants need at "
            "least one of each"
        )
    exchange = statistics.median(_implied_exchange(case, iterate) for case in plain)
    bpipe = statistics.median(_implied_bpipe(case, exchange, iterate) for case in balanced)
    return Constants(exchange, bpipe)


def leave_one_out(
    cases: Sequence[Measured], iterate: IterationTime = simulated_seconds
) -> tuple[float, ...]:
    """Each run's MFU in per cent, predicted with constants fitted on all other runs."""
    return tuple(
        predict_mfu(case, fit([*cases[:i], *cases[i + 1 :]], iterate), iterate)
        for i, case in enumerate(cases)
    )


def _implied_exchange(case: Measured, iterate: IterationTime) -> float:
    return _meet(lambda x: predict_mfu(case, Constants(x, 0), iterate), case.mfu)


def _implied_bpipe(case: Measured, exchange: float, iterate: IterationTime) -> float:
    return _meet(lambda x: predict_mfu(case, Constants(exchange, x), iterate), case.mfu)


def _meet(predict: Callable[[float], float], published: float) -> float:
    """The constant at which a falling prediction meets what was measured; 0 if it starts below.

    1/MFU is a time, piecewise linear in the constant: false position on it needs few steps.
    """

    def gap(x: float) -> float:
        return 1 / predict(x) - 1 / published

    low, high = 0.0, 1e-12
    below, above = gap(low), gap(high)
    if below >= 0:
        return low
    while above < 0:
        low, below, high = high, above, 2 * high
        above = gap(high)
    for _ in range(60):
        middle = (low * above - high * below) / (above - below)
        found = gap(middle)
        if abs(found) < 1e-13 / published:
            return middle
        if found < 0:
            low, below, above = middle, found, above / 2
        else:
            high, above, below = middle, found, below / 2
    return (low + high) / 2
