"""From a specification to the ops that one stage runs; cached, since p and m rarely change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.schedule.balancing.balance import slots
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.handshake import check_handshake
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Kind, Op, is_evictor, partner, quantity
from megatron_bpipe.schedule.programs import check_deadlock
from megatron_bpipe.schedule.validation.occupancy import remote_bytes
from megatron_bpipe.schedule.validation.validate import validate


@dataclass(frozen=True)
class StagePlan:
    """What one stage does in an iteration.

    Attributes:
        name: of the base schedule.
        ops: its lowered ops, in order.
        chunks: model chunks a stage (v).
        budget: the bound in micro-batches of a whole stage; None where nothing is balanced.
        labelled: whether messages have time labels, see ``lowering.exchanges``.
        partner: the paired stage, or None.
        slots_borrowed: units that this stage keeps on its partner at most: activations of one
            chunk, or parts of them.
        slots_lent: units that its partner keeps here at most.
        parts: in how many an activation leaves and returns (u); 1: whole.
    """

    name: str
    ops: tuple[Op, ...]
    chunks: int
    budget: float | None
    labelled: bool
    partner: int | None
    slots_borrowed: int
    slots_lent: int
    parts: int = 1

    @property
    def grain(self) -> int:
        """How many units one micro-batch of a whole stage is."""
        return self.chunks * self.parts

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed apart from the rest of the backward (W)."""
        return any(op.kind is Kind.WEIGHT for op in self.ops)

    @property
    def described(self) -> str:
        """One line for people."""
        name = "1F1B" if self.name == "1f1b" else self.name
        if self.chunks > 1:
            name = f"{name} 1F1B of {self.chunks} chunks"
        if self.budget is None:
            return f"schedule {name}"
        bound = f"budget {quantity(self.budget)} micro-batches a stage"
        how = f", in {self.parts} parts" if self.parts > 1 else ""
        return f"{name} with activations balanced: {bound}{how}"

    def pool_bytes(self, sizes: Mapping[int, Sequence[int]]) -> int:
        """Most bytes that this stage keeps on its partner at a time.

        Args:
            sizes: for each chunk, of the parts of one of its activations.
        """
        return remote_bytes(self.ops, sizes)


@lru_cache(maxsize=64)
def forward_ops(spec: ScheduleSpec, stage: int) -> tuple[Op, ...]:
    """The lowered forwards of ``stage`` without their backwards, for evaluation."""
    logical = make(spec)
    lines = (tuple(op for op in line if op.kind is Kind.FORWARD) for line in logical.stages)
    lowered = lower(replace(logical, stages=tuple(lines)))
    check_deadlock(lowered)
    return lowered.stages[stage]


@lru_cache(maxsize=64)
def stage_plan(spec: ScheduleSpec, stage: int) -> StagePlan:
    """The plan of ``stage``; validated before anything runs.

    Raises:
        ValueError: for sizes that the schedule does not work with.
        schedule.balancing.balance.BudgetError: the budget is too small for this p and m.
    """
    logical = make(spec)
    lowered = lower(logical)
    validate(lowered)
    check_handshake(lowered)
    other = partner(stage, spec.p)
    return StagePlan(
        name=spec.name,
        ops=lowered.stages[stage],
        chunks=logical.chunks,
        budget=logical.budget,
        labelled=lowered.labelled,
        partner=other,
        slots_borrowed=slots(logical, stage) if is_evictor(stage, spec.p) else 0,
        slots_lent=(
            slots(logical, other) if other is not None and is_evictor(other, spec.p) else 0
        ),
        parts=logical.parts,
    )
