"""What lives as long as the installed patch set: pools and the recorder of this rank."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.checks.forced_transport import check_forced_transport
from megatron_bpipe.integration.log import log_rank, log_rank0
from megatron_bpipe.integration.measured_balance import MeasuredBalance, check_allocator
from megatron_bpipe.integration.options import MEASURED, Options
from megatron_bpipe.integration.patches.flush_free.pipeline import Pipeline
from megatron_bpipe.integration.patches.stage_recompute import recompute_on_this_stage
from megatron_bpipe.integration.patches.v_placement.mirror import Mirror
from megatron_bpipe.integration.rank_mapping.launcher import identify
from megatron_bpipe.integration.rank_mapping.mapping import RankMap, verify
from megatron_bpipe.integration.session_report import write_report
from megatron_bpipe.integration.stage_pools import StagePools
from megatron_bpipe.runtime.executor import Observer
from megatron_bpipe.runtime.observe.link_watch import LinkSampler
from megatron_bpipe.runtime.observe.memory import (
    allocated_bytes,
    peak_watch,
    static_bytes,
    storage_ids,
)
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.runtime.store import ActivationStore, Totals
from megatron_bpipe.runtime.transport.pair.several import LentPools
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec
from megatron_bpipe.schedule.stage_plan import StagePlan


@dataclass
class Session:
    """This rank's part of a BPipe (or merely observed) run."""

    options: Options
    recorder: Recorder | None = None
    plan: StagePlan | None = None
    ranks: RankMap | None = None
    pools: StagePools | None = None
    mirror: Mirror | None = None
    pipeline: Pipeline | None = None  # what a schedule without a flush keeps between iterations
    measured: MeasuredBalance | None = None
    _group: weakref.ReferenceType[Any] | None = None
    totals: Totals = field(default_factory=Totals)  # of this pipeline, whatever its pairs
    _closing: threading.Thread | None = None
    _links: LinkSampler = field(default_factory=LinkSampler)
    _written: bool = False
    _priced: bool = False
    stage: int | None = None

    def observe(
        self, group: Any, models: Sequence[torch.nn.Module], plan: StagePlan | None = None
    ) -> None:
        """An iteration begins on the stage that this rank is in ``group``; let the recorder look.

        All there is to do where Megatron's own schedule runs, which has no plan.
        """
        self._written = False
        self.stage = group.rank()
        self.follow(group)
        if self.options.report is None and not self._measures:
            return
        if self.recorder is None:
            device = torch.device(torch.cuda.current_device())
            self.recorder = Recorder(
                group.rank(),
                dist.get_rank(),
                lambda: allocated_bytes(device),
                peak_watch(device),
                lambda: static_bytes(device.type),
            )
        kept, pipeline = set().union(*map(storage_ids, models)), self.pipeline
        if pipeline is not None:
            kept |= pipeline.versions.storages()
        goes_on = pipeline is not None and pipeline.carries
        chunks, parts = (len(models), 1) if plan is None else (plan.chunks, plan.parts)
        self.recorder.begin(kept, chunks, parts, goes_on=goes_on)

    def follow(self, group: Any) -> None:
        """Keep what belongs to this pipeline's process group, drop what belongs to another."""
        if self._group is None or self._group() is not group:
            self.drop()  # the process groups were made anew: other stages, other partners
            self.recorder = None
            self.totals = Totals()
            self._group = weakref.ref(group)

    def recompute(self, config: Any, stage: int) -> None:
        """Let this stage recompute as many layers as ``--bpipe-recompute`` says."""
        if self.options.recompute is not None:
            recompute_on_this_stage(config, self.options.recompute[stage])

    def arranged(self, spec: ScheduleSpec, group: Any) -> ScheduleSpec:
        """The schedule of the next iteration: as asked, or as measured in the first.

        With ``--bpipe-balance measured`` the call before the second iteration is a collective of
        all ranks.
        """
        if self.options.balance != MEASURED or not self.options.bpipe:
            return spec
        if self.measured is None or self._group is None or self._group() is not group:
            self.measured = MeasuredBalance(self.options)
        if self.measured.measuring:
            return self.measured.first(spec)
        if self.measured.stages is None:
            self.drop()
            if self._closing is not None:
                self._closing.join()  # what was lent is no static memory
            self.measured.share(group.rank())
            if self.options.report is None:
                self.recorder = None
        return self.measured.arranged(spec)

    @property
    def _measures(self) -> bool:
        return self.measured is not None and self.measured.measuring

    def begin(
        self,
        plan: StagePlan,
        group: Any,
        models: Sequence[torch.nn.Module],
        flops: Callable[[], float | None] = lambda: None,
        sizes_vary: bool = False,
    ) -> None:
        """An iteration begins, and BPipe's schedule runs it; waits for nobody.

        ``flops`` gives those of one micro-batch's forward, if they are known; ``sizes_vary`` says
        whether micro-batches may differ in how much they save.
        """
        self.observe(group, models, plan)
        assert self._group is not None
        if self.pools is not None and self.plan is not None and self.plan.loans != plan.loans:
            self.drop()  # other pairs from here on
        self.plan = plan
        if self.pools is None:
            self.pools = StagePools(self.options, self._group, totals=self.totals)
        sizes: dict[int, int] | None = None
        if plan.loans is not None:
            assert self.measured is not None
            sizes = self.measured.leaving(group.rank())
        self.pools.begin(plan, self._closing, self.recorder, flops, sizes_vary, sizes)

    def verify_placement(self, pipeline: Sequence[int], stage: int) -> None:
        """Check on all ranks that each runs where its placement says; rank 0 shows the table.

        ``pipeline`` are the global ranks of this rank's pipeline, ``stage`` is its place there.
        """
        if self.ranks is not None:
            identify(f"rank {self.ranks.logical}, stage {stage}")
            shown = verify(self.ranks, stage=stage)
            if self.ranks.moves_ranks:
                log_rank0(f"ranks placed so that pairs share a node\n{shown}")
        measured = self.options.balance == MEASURED
        check_forced_transport(self.options.transport, pipeline, stage, any_pair=measured)
        check_allocator(self.options)

    @property
    def store(self) -> ActivationStore | None:
        """The activation store if this rank has evicted anything."""
        return self.pools.store if self.pools is not None else None

    @property
    def acceptor_end(self) -> LentPools | None:
        """What this rank lends."""
        return self.pools.lent if self.pools is not None else None

    def observers(self) -> list[Observer]:
        """Who is told of the ops of this iteration."""
        return [one for one in (self.recorder, self._links.watch) if one is not None]

    def end(self, losses: list[Any]) -> None:
        """The iteration is over."""
        if self.recorder is not None:
            self.recorder.end(losses)
            if self._measures:
                assert self.measured is not None
                self.measured.seen(self.recorder)
        if self.store is not None:
            assert self.pools is not None
            pools = self.pools
            for said in (
                self._links.iteration_over(),
                pools.first_spill(),
                pools.coarse_parts(),
                self._price(),
            ):
                if said is not None:
                    log_rank(f"pair {self.pools.pair}: {said}")

    def _price(self) -> str | None:
        """With a memory limit, once: whether moving or recomputing is cheaper on this stage."""
        group = self._group() if self._group is not None else None
        if self.options.memory_limit is None or self._priced or group is None:
            return None
        said = self._links.moving_or_recomputing(group.rank(), group.size())
        self._priced = said is not None
        return said

    def flush(self) -> None:
        """Forget what forwards of the next iterations have done, if any have run."""
        if self.pipeline is not None and self.pipeline.discard():
            for kept in (self.store, self.acceptor_end):
                if kept is not None:
                    kept.forget()

    def failed(self, error: BaseException) -> None:
        """The iteration has failed: forget all of it, so that training can be started again."""
        why = self.acceptor_end.failure if self.acceptor_end is not None else None
        if why is not None and why is not error:  # a message that fails is what comes of it
            error.add_note(f"bpipe: the partner got no pool: {why}")
        if self.recorder is not None:
            self.recorder.abandon()
        self.totals = Totals()  # what has left may never come back
        self.drop()

    def drop(self) -> None:
        """Give pools and threads back, without waiting for the partner to do so too."""
        pools, self.pools = self.pools, None
        pipeline, self.pipeline = self.pipeline, None
        if pipeline is not None:
            pipeline.versions.forget()
        self._links = LinkSampler()
        if pools is not None:
            self._closing = threading.Thread(target=pools.close, name="bpipe-close", daemon=True)
            self._closing.start()

    def write_report(self) -> None:
        """Collect all ranks' numbers and write them; every rank must call it.

        Does nothing if nothing was trained since the last time.
        """
        if self.options.report is not None and not self._written:
            self._written = True
            write_report(self, self.options.report)

    def finish(self) -> None:
        """Training is over: write the report, if one is wanted; every rank must call it."""
        self.write_report()
        self.close()

    def close(self) -> None:
        """Give pools and threads back."""
        pools, self.pools = self.pools, None
        if pools is not None:
            pools.close()
