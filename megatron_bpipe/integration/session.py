"""What lives as long as the installed patch set: pools, stores and the recorder of this rank."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.link_forecast import forecast
from megatron_bpipe.integration.log import log_rank, log_rank0
from megatron_bpipe.integration.options import Options
from megatron_bpipe.integration.rank_mapping.mapping import RankMap, verify
from megatron_bpipe.integration.versions import package_versions
from megatron_bpipe.report.run import RankReport, StageReport, merge
from megatron_bpipe.runtime.executor import Observer
from megatron_bpipe.runtime.observe.link_watch import LinkWatch, watch
from megatron_bpipe.runtime.observe.memory import (
    allocated_bytes,
    device_bytes,
    peak_watch,
    static_bytes,
    storage_ids,
)
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.runtime.observe.report import table, write_whole
from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport import AcceptorEnd, Transport
from megatron_bpipe.runtime.transport.pair.bandwidth import Speed, measure
from megatron_bpipe.runtime.transport.pair.negotiate import Pair, open_pair
from megatron_bpipe.schedule.ops import microbatches
from megatron_bpipe.schedule.stage_plan import StagePlan


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


@dataclass
class Session:
    """This rank's part of a BPipe (or merely observed) run."""

    options: Options
    recorder: Recorder | None = None
    plan: StagePlan | None = None
    ranks: RankMap | None = None
    _store: ActivationStore | None = None
    acceptor_end: AcceptorEnd | None = None
    _peak_slots_lent: int = 0
    _transport: str = ""
    _pair: str = ""
    _watch: LinkWatch | None = None
    _link_judged: bool = False
    _announced: bool = False
    _written: bool = False
    _stage: int | None = None
    # tests look at, and tamper with, what comes back; see ActivationStore.inspect
    inspect_loaded: Any = field(default=None, repr=False)

    def observe(self, group: Any, models: Sequence[torch.nn.Module]) -> None:
        """An iteration begins on the stage that this rank is in ``group``; let the recorder look.

        All there is to do where Megatron's own schedule runs.
        """
        self._written = False
        self._stage = group.rank()
        if self.options.report is None:
            return
        if self.recorder is None:
            device = torch.device(torch.cuda.current_device())
            self.recorder = Recorder(
                group.rank(), dist.get_rank(), lambda: allocated_bytes(device), peak_watch(device)
            )
        self.recorder.begin(set().union(*map(storage_ids, models)), len(models))

    def begin(
        self,
        plan: StagePlan,
        group: Any,
        models: Sequence[torch.nn.Module],
        flops: Callable[[], float | None] = lambda: None,
    ) -> None:
        """An iteration begins, and BPipe's schedule runs it.

        ``flops`` gives those of one micro-batch's forward, if they are known.

        The acceptor lends its pool here: its partner has asked for it after its own first
        forward, which comes before any message can reach this stage.
        """
        self.observe(group, models)
        self.plan = plan
        self._peak_slots_lent = max(self._peak_slots_lent, plan.slots_lent)
        if plan.slots_lent and self.acceptor_end is None:
            assert plan.partner is not None
            pair = self._meet(group, evictor=plan.partner)
            self.acceptor_end = pair.open_acceptor()
        if plan.slots_borrowed and self._store is None:
            self._store = self._make_store(plan, self._meet(group, evictor=group.rank()), flops)
        if not self._announced:
            self._announced = True
            # rank 0 evicts in every schedule that evicts at all, so it always has a pair to show
            used = f", transport {self._transport}" if self._transport else ""
            log_rank0(f"{plan.described}{used}")

    def verify_placement(self, stage: int) -> None:
        """Check on all ranks that each runs where its placement says; rank 0 shows the table."""
        if self.ranks is not None:
            shown = verify(self.ranks, stage=stage)
            if self.ranks.moves_ranks:
                log_rank0(f"ranks placed so that pairs share a node\n{shown}")

    def store_for(self, plan: StagePlan) -> ActivationStore | None:
        """The activation store if ``plan`` evicts anything."""
        return self._store if plan.slots_borrowed else None

    def observers(self) -> list[Observer]:
        """Who is told of the ops of this iteration."""
        return [one for one in (self.recorder, self._watch) if one is not None]

    def end(self, losses: list[Any]) -> None:
        """The iteration is over."""
        if self.recorder is not None:
            self.recorder.end(losses)
        self._judge_link()

    def _judge_link(self) -> None:
        """After the second iteration that evicts (the first warms up), once."""
        if self._store is None or self._link_judged:
            return
        if self._watch is None or not self._watch.saw_transfers:
            self._watch = watch()
            return
        verdict = self._watch.verdict()
        if verdict is not None:
            log_rank(f"pair {self._pair}: {verdict}")
        self._watch, self._link_judged = None, True

    def summary(self) -> RankReport:
        """This rank's part of ``memory.json``."""
        seen = self.recorder
        assert seen is not None
        totals = self._store.totals if self._store is not None else None
        transport = self._store.transport if self._store is not None else None
        pool = self.acceptor_end.pool_bytes if self.acceptor_end is not None else 0
        stage = StageReport(
            stage=seen.stage,
            rank=seen.rank,
            own_activation_bytes=seen.peaks.activation_bytes,
            own_microbatches=seen.peaks.microbatches,
            pool_bytes=pool,
            pool_slots=microbatches(self._peak_slots_lent, seen.chunks) if pool else 0,
            hosted_bytes=transport.hosted_bytes if transport is not None else 0,
            spilled_bytes=transport.spilled_bytes if transport is not None else 0,
            evicted_bytes=totals.evicted if totals is not None else 0,
            loaded_bytes=totals.loaded if totals is not None else 0,
            exposed_seconds=seen.exposed_seconds,
            allocator_peak_bytes=seen.peaks.allocator_bytes,
            static_bytes=self._static_bytes(),
            device_bytes=device_bytes(),
            transport=self._transport.partition(" ")[0],
            forward=seen.audit.document() if seen.audit is not None else None,
        )
        return RankReport(
            stage, list(seen.iterations), list(seen.losses), seen.microbatches, seen.chunks
        )

    def counters(self) -> Counters | None:
        """This rank's figures so far; None before its first training iteration."""
        if self._stage is None:
            return None
        counters = Counters(self._stage)
        pool = self.acceptor_end.pool_bytes if self.acceptor_end is not None else 0
        if torch.cuda.is_available():
            counters.allocated = torch.cuda.max_memory_allocated()
        if self.recorder is not None:
            counters.peak = self.recorder.peaks.activation_bytes + pool
            counters.exposed = self.recorder.last_exposed_seconds
        if self.plan is not None:
            counters.pool = pool
            counters.evicted = self._store.totals.evicted if self._store is not None else 0
            transport = self._store.transport if self._store is not None else None
            counters.spilled = transport.spilled_bytes if transport is not None else 0
        return counters

    def _static_bytes(self) -> int:
        """What stays between iterations; on CUDA all of it, workspaces of libraries too."""
        assert self.recorder is not None
        device = torch.device(torch.cuda.current_device()).type
        between = self.recorder.between_iterations if device == "cuda" else None
        return static_bytes(device) if between is None else between

    def write_report(self) -> None:
        """Collect all ranks' numbers and write them; every rank must call it.

        Does nothing if nothing was trained since the last time.
        """
        folder = self.options.report
        if folder is None or self._written:
            return
        self._written = True
        if self.recorder is None:
            log_rank0(
                "--bpipe-report: nothing to write; it sees pipelines without interleaving only"
            )
            return
        timeline = self.recorder.timeline_document()
        write_whole(folder / timeline.file_name, timeline.text())
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self.summary())
        if dist.get_rank() == 0:
            report = merge(
                ranks,
                bpipe=self.options.bpipe,
                budget=self.plan.budget if self.plan is not None else None,
                schedule=self.plan.name if self.plan is not None else None,
                written=datetime.now(UTC).isoformat(timespec="seconds"),
                flags=sys.argv[1:],
                packages=package_versions(),
            )
            write_whole(folder / "memory.json", report.text())
            log_rank0(f"report written to {folder}\n{table(report)}")

    def finish(self) -> None:
        """Training is over: write the report, if one is wanted; every rank must call it."""
        self.write_report()
        self.close()

    def close(self) -> None:
        """Give pools and threads back."""
        ends = (self._store, self.acceptor_end)
        self._store = self.acceptor_end = None
        for end in ends:
            if end is not None:
                # the job may be going down: a store or a driver that is gone is no news then
                with contextlib.suppress(OSError, RuntimeError):
                    end.close()

    def _make_store(
        self, plan: StagePlan, pair: Pair, flops: Callable[[], float | None]
    ) -> ActivationStore:
        def connect(microbatch_bytes: int) -> Transport:
            transport = pair.open_evictor(microbatch_bytes, plan.slots_borrowed)
            speed = None
            if self.options.measure_links and pair.transport != "p2p":
                speed = measure(transport, microbatch_bytes, pair.device)
            lines = [
                _measured(pair.transport, speed) if self.options.measure_links else None,
                forecast(pair.transport, pair.link, microbatch_bytes, flops(), speed),
            ]
            for line in lines:
                if line is not None:
                    log_rank(f"pair {pair.rendezvous.pair}: {line}")
            return transport

        return ActivationStore(
            connect,
            keep_local=self.options.keep_local,
            on_load=self.recorder.loaded if self.recorder is not None else None,
            inspect=self.inspect_loaded,
        )

    def _meet(self, group: Any, evictor: int) -> Pair:
        device = torch.device(torch.cuda.current_device())
        pair = open_pair(group, evictor, self.options.transport, device, self.options.deadline)
        chosen = "chosen by auto: " if self.options.transport == "auto" else ""
        self._transport = f"{pair.transport} ({chosen}{pair.why})"
        self._pair = pair.rendezvous.pair
        return pair


def _measured(transport: str, speed: Speed | None) -> str:
    if speed is None:
        return "p2p needs both ends for every copy: its speed shows in the report's timeline"
    return (
        f"{transport} copies {speed.size / 2**20:.1f} MiB at {speed.out / 2**30:.1f} GiB/s "
        f"out and {speed.back / 2**30:.1f} GiB/s back"
    )
