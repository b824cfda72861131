"""Reports as ``--bpipe-report`` would write them for runs that went exactly as simulated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_bpipe.report.run import RunReport, StageReport
from megatron_bpipe.report.timeline import Event, Timeline
from megatron_bpipe.schedule import balance, lower, one_f_one_b
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.schedule.validation.occupancy import lent as lent_slots
from megatron_bpipe.simulate import even_costs, simulate

UNIT = 2**20  # bytes of one micro-batch on one stage


def write_report(
    folder: Path,
    p: int,
    m: int,
    bpipe: bool,
    *,
    v: int = 1,
    transfer: float = 0.05,
    slower: float = 1.0,
    losses: Sequence[Sequence[str]] = (),
    flags: Sequence[str] = (),
) -> None:
    """Six iterations, each ``slower`` times as long as the simulated one from start to start."""
    schedule = one_f_one_b(p, m) if v == 1 else interleaved(p, m, v)
    if bpipe:
        schedule = balance(schedule)
    costs = even_costs(p, forward=0.1, backward=0.2, chunks=v, send=0.001, transfer=transfer)
    found = simulate(lower(schedule), costs)
    copies = {(t.stage, str(t.op)): (t.start + 100, t.end + 100) for t in found.transfers}
    stages = []
    for stage, line in enumerate(found.schedule.stages):
        events, live, most, evicted = [], 0, 0, 0
        for op, start, end in zip(line, found.starts[stage], found.ends[stage], strict=True):
            live += {"F": 1, "L": 1, "B": -1, "EW": -1}.get(op.kind.value, 0)
            most = max(most, live)
            waits = op.kind in (Kind.EVICT_WAIT, Kind.LOAD_WAIT)
            span = copies[stage, str(op).replace("W", "")] if waits else (None, None)
            size = UNIT // v if op.kind in (Kind.EVICT, Kind.LOAD) else 0
            evicted += size if op.kind is Kind.EVICT else 0
            times = (start + 100, end + 100)
            exposed = end - start if waits else None
            held = (UNIT // v * live, live / v)
            events.append(Event(str(op), *times, size, *held, *span, exposed))
        timeline = Timeline(stage, stage, [events])
        (folder / timeline.file_name).write_text(timeline.text())
        lent = lent_slots(schedule, stage) if bpipe else 0
        stages.append(
            StageReport(
                stage=stage,
                rank=stage,
                own_activation_bytes=UNIT // v * most,
                own_microbatches=most / v,
                static_bytes=0,
                pool_bytes=UNIT // v * lent,
                pool_slots=lent / v,
                evicted_bytes=6 * evicted,
                exposed_seconds=sum(e.exposed or 0 for e in events) if evicted else None,
                transport="shm" if evicted or lent else "",
            )
        )
    starts = [100 + n * slower * found.seconds for n in range(6)]
    run = RunReport(
        bpipe=bpipe,
        budget=schedule.budget if bpipe else None,
        p=p,
        m=m,
        v=v,
        stages=tuple(stages),
        iterations=[[start, start + found.seconds] for start in starts],
        losses=losses,
        schedule="1f1b" if v == 1 else "interleaved",
        transport="shm" if bpipe else "",
        flags=flags,
    )
    (folder / "memory.json").write_text(run.text())
