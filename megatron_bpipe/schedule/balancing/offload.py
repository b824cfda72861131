"""Host offload: every stage sends what it cannot hold to its own host memory.

The same E and L as BPipe's, placed by the same optimal rule, but any stage may evict, nobody lends
and the copies run over the stage's own PCIe link.  Units: micro-batches.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_bpipe.schedule.balancing.balance import insert
from megatron_bpipe.schedule.balancing.min_evictions import fewest_evictions
from megatron_bpipe.schedule.ops import Schedule
from megatron_bpipe.schedule.validation.occupancy import live, spans


def offload(schedule: Schedule, budget: int) -> Schedule:
    """The schedule with evictions to the host that keep every stage within ``budget``.

    Raises ValueError where a stage cannot: below 3, as one micro-batch may leave and one come back
    beside each computation, or for schedules whose backwards come in another order than their
    forwards.
    """
    stages = []
    for stage, line in enumerate(schedule.stages):
        lives = spans(line)
        need = [count - budget for count in live(lives)]
        if max(need, default=0) <= 0:
            stages.append(line)
            continue
        stays = fewest_evictions(lives, need, [len(lives)] * len(need))
        if stays is None:
            raise ValueError(f"budget {budget} is too small for stage {stage}: use {budget + 1}")
        stages.append(insert(line, stays))
    return replace(
        schedule, name=f"{schedule.name}+host", stages=tuple(stages), budget=budget, to_host=True
    )
