"""A recorded run with its prediction behind it: same schedule, costs measured in the recording."""

from __future__ import annotations

import itertools
from dataclasses import replace

from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Kind, Schedule
from megatron_bpipe.schedule.validation.occupancy import with_own_loans
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
    schedule = what_ran(recording)
    found = simulate(lower(schedule), measured_costs(recording))
    ghost = panel_of(found, measured_bytes(recording), "predicted", "s")
    real = panel(recording, title)
    apart = found.seconds / recording.seconds - 1
    text = f"{time_text(found.seconds, 's')} ({100 * apart:+.1f} %)"
    return replace(real, ghost=ghost, facts=(*real.facts, ("predicted", text)))


def what_ran(recording: Recording) -> Schedule:
    """The schedule of a recording: the catalogue's, or with loans of its own what was recorded."""
    run = recording.run
    lines = tuple(
        tuple(seen.op for seen in stage if seen.op.kind.logical) for stage in recording.stages
    )
    if any(op.other is not None for line in lines for op in line):
        return with_own_loans(Schedule(run.schedule, recording.microbatches, lines))
    forwards = [seen.op for seen in recording.stages[0] if seen.op.kind is Kind.FORWARD]
    # interleaving begins with the first group's micro-batches through the first chunk
    group = len(list(itertools.takewhile(lambda op: op.chunk == 0, forwards)))
    return make(
        ScheduleSpec(
            run.schedule,
            len(recording.stages),
            recording.microbatches,
            run.v,
            group if run.v > 1 else None,
            balanced=run.budget is not None,
            budget=run.budget,
            parts=run.parts,
        )
    )
