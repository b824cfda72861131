"""From the user's settings to the ops a stage runs; cached, since p and m rarely change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_bpipe.schedule.balancing.balance import balance, slots
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Op, default_budget, is_evictor, partner
from megatron_bpipe.schedule.validation.validate import validate


@dataclass(frozen=True)
class StagePlan:
    """What one stage does in an iteration.

    Attributes:
        ops: its lowered ops, in order.
        budget: the bound in micro-batches.
        partner: the paired stage, or None.
        slots_borrowed: micro-batches this stage keeps on its partner at most.
        slots_lent: micro-batches its partner keeps here at most.
    """

    ops: tuple[Op, ...]
    budget: int
    partner: int | None
    slots_borrowed: int
    slots_lent: int


@lru_cache(maxsize=64)
def stage_plan(stages: int, microbatches: int, stage: int, budget: int | None) -> StagePlan:
    """The plan of ``stage``; validated before anything runs.

    Raises:
        schedule.balancing.balance.BudgetError: the budget is too small for this p and m.
    """
    bound = default_budget(stages) if budget is None else budget
    logical = balance(one_f_one_b(stages, microbatches), bound)
    lowered = lower(logical)
    validate(lowered, bound)
    other = partner(stage, stages)
    borrowed = slots(logical, stage) if is_evictor(stage, stages) else 0
    lent = slots(logical, other) if other is not None and is_evictor(other, stages) else 0
    return StagePlan(lowered.stages[stage], bound, other, borrowed, lent)
