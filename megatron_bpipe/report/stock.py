"""What each stage would hold without balancing, as the stock schedule foretells."""

from __future__ import annotations

from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.validation.occupancy import peak


def stock_microbatches(p: int, m: int, v: int = 1) -> tuple[float | None, ...]:
    """Most micro-batches on each stage; None where Megatron's schedule for these is not known."""
    if m < 1:
        return (None,) * p
    try:
        schedule = make(ScheduleSpec("1f1b" if v == 1 else "interleaved", p, m, v))
    except ValueError:
        return (None,) * p
    return tuple(peak(line) / v for line in schedule.stages)
