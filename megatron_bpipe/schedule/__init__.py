"""The schedule as data: build, balance, lower, prove, print.  Pure Python.

::

    schedule = lower(balance(one_f_one_b(p=8, m=32)))
    validate(schedule)

Read in this order: ``ops`` (the words), ``base`` (1F1B), ``paging`` (when to evict and load),
``balance`` (the pass), ``lower`` (messages), ``validate`` (the proof), ``text`` (CSV, drawing).
"""

from megatron_bpipe.schedule.balance import BudgetError, balance, least_budget, slots
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.lower import batches, lower
from megatron_bpipe.schedule.ops import (
    DOWN,
    UP,
    Direction,
    Kind,
    Op,
    Schedule,
    default_budget,
    is_evictor,
    partner,
)
from megatron_bpipe.schedule.text import draw, from_csv, to_csv
from megatron_bpipe.schedule.validate import validate

__all__ = [
    "DOWN",
    "UP",
    "BudgetError",
    "Direction",
    "Kind",
    "Op",
    "Schedule",
    "ScheduleError",
    "balance",
    "batches",
    "default_budget",
    "draw",
    "from_csv",
    "is_evictor",
    "least_budget",
    "lower",
    "one_f_one_b",
    "partner",
    "slots",
    "to_csv",
    "validate",
]
