"""``--bpipe-balance measured``: the first iteration shows every stage's bytes, then they decide.

    iteration 1     balanced by the paper's rule, observed on every rank
    before 2        one collective of all ranks: what each stage needs; the same answer on all,
                    said in one line on rank 0, or the reason why a limit cannot be kept
    from 2 on       the loans that follow from bytes

What is static is measured before the second iteration, when optimizer state is there and the first
iteration's pools are given back.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.log import abort, log_rank0
from megatron_bpipe.integration.options import MEASURED, Options
from megatron_bpipe.runtime.observe.memory import allocated_bytes, static_bytes
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.schedule.balancing.balance import BudgetError, balance
from megatron_bpipe.schedule.balancing.lending import Lending, LimitError
from megatron_bpipe.schedule.balancing.ways import (
    Arrangement,
    MeasuredStage,
    arrangement,
    foretold,
    solve,
    worst_of,
)
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.ops import HOST, Schedule

MIB = 2**20
ON_HOST = "host"  # the transport that lends nothing


@dataclass(frozen=True)
class RankBytes:
    """What one rank found in the first iteration.

    ``static`` is there between iterations, ``working`` in computing beside activations; ``held``
    and ``leaving`` are of one activation of each chunk.
    """

    stage: int
    static: int
    working: int
    held: tuple[int, ...]
    leaving: tuple[int, ...]


@dataclass
class MeasuredBalance:
    """One pipeline's measurement, and what follows from it.

    Attributes:
        options: what the user asked for.
        stages: what was measured; None before.
        foretold: the peak of each stage from the second iteration on.
    """

    options: Options
    stages: tuple[MeasuredStage, ...] | None = None
    foretold: tuple[int, ...] = ()
    _found: dict[ScheduleSpec, Arrangement] = field(default_factory=dict)
    _first: Recorder | None = None  # of the first iteration, when that is over

    @property
    def measuring(self) -> bool:
        """Whether the first iteration is still to be seen."""
        return self._first is None

    def first(self, spec: ScheduleSpec) -> ScheduleSpec:
        """What the first iteration runs: the paper's rule, where it can balance the schedule."""
        try:
            make(spec)
        except BudgetError:
            return replace(spec, balanced=False)
        return spec

    def seen(self, recorder: Recorder) -> None:
        """The first iteration is over."""
        assert recorder.working.most is not None, "see check_allocator"
        self._first = recorder

    def share(self, stage: int) -> None:
        """Before the second iteration: tell all ranks, hear all ranks; a collective."""
        first = self._first
        assert first is not None
        first.settle()
        working = first.working.most
        assert working is not None
        device = torch.device(torch.cuda.current_device())
        static = static_bytes("cpu") if device.type == "cpu" else allocated_bytes(device)
        assert static is not None
        mine = RankBytes(stage, static, working, first.sizes.held, first.sizes.leaving)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        limit = self.options.memory_limit
        for one in everyone:
            if limit is not None and one.static > limit:
                abort(_below_static(limit, one))
        self.stages = tuple(
            worst_of([_as_stage(one) for one in everyone if one.stage == x])
            for x in range(1 + max(one.stage for one in everyone))
        )

    def leaving(self, stage: int) -> dict[int, int]:
        """Bytes that leave with one activation of each chunk of a stage."""
        assert self.stages is not None
        return dict(enumerate(self.stages[stage].leaving))

    def arranged(self, spec: ScheduleSpec) -> ScheduleSpec:
        """The specification with the loans that follow from what was measured.

        Raises:
            Abort: the limit cannot be kept; on every rank, rank 0 has said by how much.
        """
        assert self.stages is not None
        if spec not in self._found:
            base = make(replace(spec, balanced=False))
            options, host = self.options, self.options.transport == ON_HOST
            try:
                found = solve(base, self.stages, options.memory_limit, host)
            except LimitError as error:
                abort(_not_kept(error))
            self.foretold = found.peaks
            self._found[spec] = arrangement(found)
            log_rank0(described(base, self.stages, found, spec.budget))
        return replace(spec, balanced=False, budget=None, arrangement=self._found[spec])


def _as_stage(one: RankBytes) -> MeasuredStage:
    return MeasuredStage(one.static + one.working, one.held, one.leaving)


def described(
    base: Schedule, stages: tuple[MeasuredStage, ...], found: Lending, budget: float | None
) -> str:
    """What will be done, in one line, in MiB."""
    stock = foretold(base, stages)
    text = f"balance by measured peaks: {_fullest(found.peaks)}; stock {_fullest(stock)}"
    with contextlib.suppress(BudgetError):  # the paper's rule cannot balance every schedule
        text += f", the paper's rule {_fullest(foretold(balance(base, budget), stages))}"
    if not found.loans:
        return f"{text}; nothing is moved"
    loans = ", ".join(
        f"stage {loan.evictor} -> {'host' if loan.lender == HOST else loan.lender} ({loan.slots})"
        for loan in found.loans
    )
    moved = f"{found.moved / MIB:.1f} MiB leave in an iteration"
    return f"{text}; {loans} activations at a time; {moved}"


def _fullest(peaks: tuple[int, ...]) -> str:
    x = peaks.index(max(peaks))
    return f"fullest stage {x} with {peaks[x] / MIB:.1f} MiB"


def _below_static(limit: int, one: RankBytes) -> str:
    return (
        f"--bpipe-memory-limit {limit / MIB:.1f}MiB is below what stage {one.stage} keeps between "
        f"iterations, {one.static / MIB:.1f} MiB of parameters, gradients and optimizer state: "
        "raise it, or use more stages or --use-distributed-optimizer"
    )


def _not_kept(error: LimitError) -> str:
    limit, least = error.limit / MIB, error.least / MIB
    return (
        f"--bpipe-memory-limit {limit:.1f}MiB cannot be kept: stage {error.stage} needs "
        f"{least:.1f} MiB, {least - limit:.1f} MiB more, whoever lends; raise it by that, or use "
        "--recompute-granularity or more stages"
    )


def check_allocator(options: Options) -> None:
    """Stop every rank if some rank cannot see what its allocator has handed out; a collective.

    Raises:
        Abort: some rank cannot; rank 0 has named it.
    """
    if options.balance != MEASURED:
        return
    visible = allocated_bytes(torch.device(torch.cuda.current_device())) is not None
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, visible)
    if not all(everyone):
        abort(
            f"--bpipe-balance measured needs the bytes that the allocator has handed out, but rank "
            f"{everyone.index(False)} cannot see them (its C library has no mallinfo2: glibc 2.33 "
            "or later does); use --bpipe-balance paper"
        )
