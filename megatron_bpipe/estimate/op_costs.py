"""A training run as the simulator needs it: seconds of each op, bytes of each stage, links.

The time of a stage is that of a single stage as measured (its MFU), the output layer on top of it
on the last one; a backward takes twice a forward, half of it for the weights where it is split.
The exchange between stages is the constant fitted on the published runs.

Units: seconds, bytes, MFU in per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bpipe.estimate.activations import micro_batch_bytes
from megatron_bpipe.estimate.memory import BF16, FIXED_OVERHEAD, StageMemory, memory_by_stage
from megatron_bpipe.estimate.refined import Constants, Measured, costs
from megatron_bpipe.schedule.ops import Kind, Schedule
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.memory import StageBytes
from megatron_bpipe.simulate.network import Link, Network

PCIE = 15e9
"""Host link of one GPU: PCIe 4 shared both ways, about 15 GB/s as observed (datasheet: 32)."""


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
    run = case.run
    cost = costs(case, constants)
    chunks = 1 + max(op.chunk for op in schedule.stages[0])
    split = any(op.kind is Kind.WEIGHT for op in schedule.stages[0])
    head_stage = _head_stage(schedule)
    memories = memory_by_stage(run, case.kernels, BF16, FIXED_OVERHEAD)
    stages, sizes = [], []
    for stage in range(run.layout.pp):
        memory = _with_head(memories, stage, head_stage)
        unit = cost.stage / chunks / 3
        head = cost.head / 3 if stage == head_stage else 0.0
        moved = micro_batch_bytes(run, stage, case.kernels)
        forward = [unit] * chunks
        forward[-1] += head
        backward = [f if split else 2 * f for f in forward]
        stages.append(
            StageCosts(tuple(forward), tuple(backward), tuple(forward), moved=moved // chunks)
        )
        working = memory.logits + memory.recompute + memory.overhead
        sizes.append(
            StageBytes(
                activation=(moved // chunks,),
                weights=memory.weights,
                gradients=memory.gradients + working,
                optimizer=memory.optimizer,
            )
        )
    network = Network(local=Link(case.gpu.nvlink), host=Link(PCIE))
    return Inputs(Costs(tuple(stages), send=cost.exchange, once=cost.once), tuple(sizes), network)


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
