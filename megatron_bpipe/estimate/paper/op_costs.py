"""The re-evaluation's runs as the simulator needs them: seconds of each op, bytes, links.

For any schedule of the catalogue, V shapes and split backwards too.

A stage's time is that of its layers, the output layer on top of it where that lies; where the
backward is split, half of it is for the weights.  Stages may have unlike numbers of layers and run
on unlike GPUs.  The exchange between stages is the constant fitted on the published runs.

Units: seconds, bytes, MFU in per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bpipe.estimate.memory.activations import FUSED, Kernels, micro_batch_bytes
from megatron_bpipe.estimate.memory.stages import StageMemory, memory_by_stage
from megatron_bpipe.estimate.memory.weight_gradients import left_for_weight
from megatron_bpipe.estimate.paper.refined import (
    Constants,
    Measured,
    exchange_seconds,
    once_seconds,
)
from megatron_bpipe.estimate.paper.stage_pace import pace_of_mfu
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.op_costs import Machine, Stored
from megatron_bpipe.schedule.ops import Kind, Schedule
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.memory import StageBytes
from megatron_bpipe.simulate.network import Link, Network


@dataclass(frozen=True)
class Inputs:
    """What ``simulate`` and ``memory_steps`` take."""

    costs: Costs
    sizes: tuple[StageBytes, ...]
    network: Network


def inputs_for(case: Measured, constants: Constants, schedule: Schedule) -> Inputs:
    """Costs and sizes of this run under that schedule; ``case.mfu`` and its ``bpipe`` are ignored.

    Fixed overhead and the working memory of the output layer are counted with the gradients.
    """
    run, p = case.run, case.run.layout.pp
    pace = pace_of_mfu(run, case.gpu, case.stage_mfu)
    machine = Machine(
        (case.gpu,) * p, (pace,) * p, case.gpu.nvlink, case.gpu.network, case.gpu.host
    )
    stored = Stored(case.kernels)
    given = _costs_for(run, schedule, machine, constants, stored.kernels)
    network = Network(local=Link(machine.pair), host=Link(machine.host))
    return Inputs(given, _sizes(run, schedule, stored), network)


def _costs_for(
    run: Run,
    schedule: Schedule,
    machine: Machine,
    constants: Constants,
    kernels: Kernels = FUSED,
) -> Costs:
    """Seconds of every op of this schedule."""
    chunks = 1 + max(op.chunk for op in schedule.stages[0])
    split = any(op.kind is Kind.WEIGHT for op in schedule.stages[0])
    head_stage = _head_stage(schedule)
    stages = []
    for stage, pace in enumerate(machine.paces):
        layers = run.layers_of(stage) / chunks
        forward, backward = [layers * pace.forward] * chunks, [layers * pace.backward] * chunks
        if stage == head_stage:
            forward[-1] += pace.head_forward
            backward[-1] += pace.head_backward
        half = [seconds / 2 for seconds in backward]
        moved = micro_batch_bytes(run, stage, kernels) // chunks
        stages.append(
            StageCosts(tuple(forward), tuple(half if split else backward), tuple(half), moved=moved)
        )
    once = max(
        once_seconds(run, stage, gpu, machine.replicas) for stage, gpu in enumerate(machine.gpus)
    )
    return Costs(tuple(stages), send=exchange_seconds(run, constants, kernels), once=once)


def _sizes(run: Run, schedule: Schedule, stored: Stored) -> tuple[StageBytes, ...]:
    chunks = 1 + max(op.chunk for op in schedule.stages[0])
    memories = memory_by_stage(run, stored.kernels, stored.state, stored.overhead)
    head_stage, sizes = _head_stage(schedule), []
    for stage in range(run.layout.pp):
        memory = _with_head(memories, stage, head_stage)
        working = memory.working + memory.overhead
        whole = micro_batch_bytes(run, stage, stored.kernels)
        left = left_for_weight(run, stage, stage == head_stage, stored.kernels)
        sizes.append(
            StageBytes(
                activation=(whole // chunks,),
                weights=memory.weights,
                gradients=memory.gradients + working,
                optimizer=memory.optimizer,
                kept_for_weight=left / whole,
            )
        )
    return tuple(sizes)


def _with_head(memories: Sequence[StageMemory], stage: int, head_stage: int) -> StageMemory:
    """One stage's memory, the output layer's part on ``head_stage`` and not on the last."""
    last = len(memories) - 1
    if head_stage == last or last < 2:
        return memories[stage]
    inner = memories[1]
    if stage == last:
        return inner
    if stage != head_stage:
        return memories[stage]
    parts = {
        name: value + getattr(memories[last], name) - getattr(inner, name)
        for name, value in vars(memories[stage]).items()
    }
    return StageMemory(**parts)


def _head_stage(schedule: Schedule) -> int:
    """Where the last layers lie: stage 0 for V shapes, whose last chunk goes up."""
    last = max(schedule.stages[0], key=lambda op: op.chunk)
    return 0 if last.chunk and last.direction.value else schedule.p - 1
