"""The schedule as data: build, balance, lower, prove, print.  Pure Python.

::

    schedule = lower(balance(one_f_one_b(p=8, m=32)))
    validate(schedule)

Read in this order: ``ops`` (the words), ``base`` (1F1B), ``balancing`` (when to evict and load),
``lowering`` (messages), ``validation`` (the proof), ``text`` (CSV, drawing).

Speed: the two lines above with p = 64, m = 1024 (448,184 lowered ops) take 1.4 s, of which balance
0.2 s, lower 0.45 s, validate 0.75 s (Python 3.12.1, one core of an AMD EPYC virtual machine)::

    import timeit, megatron_bpipe.schedule as s
    timeit.timeit(lambda: s.validate(s.lower(s.balance(s.one_f_one_b(64, 1024)))), number=1)
"""

from megatron_bpipe.schedule.balancing.balance import BudgetError, balance, least_budget, slots
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.lowering.lower import batches, lower
from megatron_bpipe.schedule.ops import (
    DOWN,
    UP,
    ActivationKey,
    Direction,
    Kind,
    Op,
    PartKey,
    Schedule,
    default_budget,
    is_evictor,
    partner,
)
from megatron_bpipe.schedule.text import draw, from_csv, to_csv
from megatron_bpipe.schedule.validation.validate import validate

__all__ = [
    "DOWN",
    "UP",
    "ActivationKey",
    "BudgetError",
    "Direction",
    "Kind",
    "Op",
    "PartKey",
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
