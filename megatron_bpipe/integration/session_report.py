"""What a session says of itself: ``memory.json``, the timeline, figures for the training log."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.checks.versions import package_versions
from megatron_bpipe.integration.log import log_rank0
from megatron_bpipe.report.run import RankReport, StageReport, merge
from megatron_bpipe.runtime.observe.memory import device_bytes, static_bytes
from megatron_bpipe.runtime.observe.report import table, write_whole
from megatron_bpipe.schedule.ops import microbatches
from megatron_bpipe.schedule.validation.bytes_bound import own_bytes

if TYPE_CHECKING:
    from megatron_bpipe.integration.session import Session


@dataclass
class Counters:
    """One rank's figures while it trains, in bytes and seconds; None: not measured in this run.

    ``peak`` of live activations and pool, ``allocated`` the CUDA allocator's peak, ``pool`` lent,
    ``evicted`` since the start, of it ``spilled`` because the pool had no room, ``exposed`` in the
    last iteration.
    """

    stage: int
    peak: int | None = None
    allocated: int | None = None
    pool: int | None = None
    evicted: int | None = None
    exposed: float | None = None
    spilled: int | None = None


def summary(session: Session) -> RankReport:
    """This rank's part of ``memory.json``."""
    seen = session.recorder
    assert seen is not None
    store, lent, pools = session.store, session.acceptor_end, session.pools
    transport = store.transport if store is not None else None
    pool = lent.pool_bytes if lent is not None else 0
    grain = session.plan.grain if session.plan is not None else seen.chunks
    stage = StageReport(
        stage=seen.stage,
        rank=seen.rank,
        own_activation_bytes=seen.peaks.activation_bytes,
        own_microbatches=seen.peaks.microbatches,
        pool_bytes=pool,
        pool_slots=(
            microbatches(pools.peak_slots_lent, grain) if pools is not None and pool else 0
        ),
        hosted_bytes=transport.hosted_bytes if transport is not None else 0,
        spilled_bytes=transport.spilled_bytes if transport is not None else 0,
        evicted_bytes=session.totals.evicted,
        loaded_bytes=session.totals.loaded,
        exposed_seconds=seen.exposed_seconds,
        allocator_peak_bytes=seen.peaks.allocator_bytes,
        static_bytes=_static_bytes(session),
        held_bytes=list(seen.sizes.held),
        leaving_bytes=list(seen.sizes.leaving),
        working_bytes=seen.working.most,
        foretold_peak_bytes=(
            session.measured.foretold[seen.stage]
            if session.measured is not None and session.measured.foretold
            else None
        ),
        bound_bytes=_bound_bytes(session, pool),
        device_bytes=device_bytes(),
        transport=pools.transport if pools is not None else "",
        left_for_weight_bytes=seen.left_for_weight_bytes,
        forward=seen.audit.document() if seen.audit is not None else None,
    )
    return RankReport(
        stage, list(seen.iterations), list(seen.losses), seen.microbatches, seen.chunks
    )


def _bound_bytes(session: Session, pool: int) -> int | None:
    """What this stage holds at most by the schedule, the lent pool included."""
    plan, seen, store = session.plan, session.recorder, session.store
    assert seen is not None
    if plan is None or plan.splits_backward or session.pipeline is not None:
        return None
    held, leaving = seen.sizes.held, seen.sizes.leaving
    block = max((one.block for one in store.measured.values()), default=0) if store else 0
    return own_bytes(plan.ops, held, leaving, plan.parts, block) + pool


def counters(session: Session) -> Counters | None:
    """This rank's figures so far; None before its first training iteration."""
    if session.stage is None:
        return None
    found = Counters(session.stage)
    pool = session.acceptor_end.pool_bytes if session.acceptor_end is not None else 0
    if torch.cuda.is_available():
        found.allocated = torch.cuda.max_memory_allocated()
    if session.recorder is not None:
        found.peak = session.recorder.peaks.activation_bytes + pool
        found.exposed = session.recorder.last_exposed_seconds
    if session.plan is not None:
        found.pool = pool
        found.evicted = session.totals.evicted
        transport = session.store.transport if session.store is not None else None
        found.spilled = transport.spilled_bytes if transport is not None else 0
    return found


def _static_bytes(session: Session) -> int:
    """What stays between iterations; on CUDA all of it, workspaces of libraries too."""
    assert session.recorder is not None
    device = torch.device(torch.cuda.current_device()).type
    between = session.recorder.between_iterations if device == "cuda" else None
    return static_bytes(device) if between is None else between


def write_report(session: Session, folder: Path) -> None:
    """Collect all ranks' numbers and write them; every rank must call it."""
    if session.recorder is None:
        log_rank0(
            "--bpipe-report: nothing to write; no iteration has gone through a pipeline's schedule"
        )
        return
    timeline = session.recorder.timeline_document()
    write_whole(folder / timeline.file_name, timeline.text())
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, summary(session))
    if dist.get_rank() == 0:
        report = merge(
            ranks,
            bpipe=session.options.bpipe,
            budget=session.plan.budget if session.plan is not None else None,
            schedule=session.plan.name if session.plan is not None else None,
            parts=session.plan.parts if session.plan is not None else 1,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            flags=sys.argv[1:],
            packages=package_versions(),
        )
        write_whole(folder / "memory.json", report.text())
        log_rank0(f"report written to {folder}\n{table(report)}")
