"""A recorded run with its prediction behind it: same schedule, costs measured in the recording."""

from __future__ import annotations

from dataclasses import replace

from megatron_bpipe.schedule.balancing.balance import balance
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.simulate.draw.picture import Panel, panel_of, time_text
from megatron_bpipe.simulate.engine import simulate
from megatron_bpipe.simulate.recorded.recording import (
    Recording,
    measured_bytes,
    measured_costs,
    panel,
)


def overlay(recording: Recording, title: str) -> Panel:
    """The recording as a panel whose ghost is the simulation of what ran.

    The simulation knows the means of the op times only: what lies apart is variation from
    micro-batch to micro-batch and what the recording's machine did besides.
    """
    p, m, v = len(recording.stages), recording.microbatches, recording.run.v
    schedule = one_f_one_b(p, m) if v == 1 else interleaved(p, m, v)
    if recording.run.bpipe:
        schedule = balance(schedule, recording.run.budget)
    found = simulate(lower(schedule), measured_costs(recording))
    ghost = panel_of(found, measured_bytes(recording), "predicted", "s")
    real = panel(recording, title)
    apart = found.seconds / recording.seconds - 1
    text = f"{time_text(found.seconds, 's')} ({100 * apart:+.1f} %)"
    return replace(real, ghost=ghost, facts=(*real.facts, ("predicted", text)))
