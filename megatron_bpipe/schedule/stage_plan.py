"""From a specification to the ops that one stage runs; cached, since p and m rarely change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.handshake import check_handshake
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Kind, Loan, Op, PartKey, quantity
from megatron_bpipe.schedule.programs import check_deadlock
from megatron_bpipe.schedule.validation.occupancy import loans_of, remote_bytes
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
        borrows: who keeps how many units of this stage at most: activations of one chunk, or parts
            of them.
        lends: whose units this stage keeps at most.
        loans: of the whole schedule where it has its own, see `Schedule`; None: the paper's pairs.
        parts: in how many an activation leaves and returns (u); 1: whole.
    """

    name: str
    ops: tuple[Op, ...]
    chunks: int
    budget: float | None
    labelled: bool
    borrows: tuple[Loan, ...]
    lends: tuple[Loan, ...]
    loans: tuple[Loan, ...] | None = None
    parts: int = 1

    @property
    def grain(self) -> int:
        """How many units one micro-batch of a whole stage is."""
        return self.chunks * self.parts

    @property
    def slots_borrowed(self) -> int:
        """Units of this stage that are kept elsewhere at most."""
        return sum(loan.slots for loan in self.borrows)

    @property
    def slots_lent(self) -> int:
        """Units of others that are kept here at most."""
        return sum(loan.slots for loan in self.lends)

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
        if self.loans:
            return f"{name} with activations balanced by measured peaks"
        if self.budget is None:
            return f"schedule {name}"
        bound = f"budget {quantity(self.budget)} micro-batches a stage"
        how = f", in {self.parts} parts" if self.parts > 1 else ""
        return f"{name} with activations balanced: {bound}{how}"

    def pool_bytes(self, sizes: Mapping[int, Sequence[int]], lender: int | None = None) -> int:
        """Most bytes that this stage keeps elsewhere at a time.

        Args:
            sizes: for each chunk, of the parts of one of its activations.
            lender: on this stage only; None: on whoever lends.
        """
        if self.grain == 1:  # also where what leaves returns in a later iteration
            loans = (loan for loan in self.borrows if lender in (None, loan.lender))
            return sum(loan.slots for loan in loans) * sizes[0][0]
        moves = Kind.EVICT, Kind.LOAD
        ops = [op for op in self.ops if op.kind not in moves or lender in (None, op.other)]
        return remote_bytes(ops, sizes)

    @property
    def lender_of(self) -> Mapping[PartKey, int]:
        """Who keeps each activation that leaves, where the schedule has loans of its own."""
        return {
            op.part_key: op.other
            for op in self.ops
            if op.kind is Kind.EVICT and op.other is not None
        }


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
    loans = loans_of(logical)
    return StagePlan(
        name=spec.name,
        ops=lowered.stages[stage],
        chunks=logical.chunks,
        budget=logical.budget,
        labelled=lowered.labelled,
        borrows=tuple(loan for loan in loans if loan.evictor == stage),
        lends=tuple(loan for loan in loans if loan.lender == stage),
        loans=logical.loans,
        parts=logical.parts,
    )
