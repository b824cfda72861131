"""What one rank keeps for one pipeline: the pool it borrows or lends, and its evicted bytes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bpipe.integration.link_forecast import forecast
from megatron_bpipe.integration.log import log_rank, log_rank0
from megatron_bpipe.integration.options import Options
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.runtime.store import ActivationStore, Totals
from megatron_bpipe.runtime.transport import Transport
from megatron_bpipe.runtime.transport.pair.bandwidth import Speed, measure
from megatron_bpipe.runtime.transport.pair.catalogue import AUTO
from megatron_bpipe.runtime.transport.pair.handshake import (
    BorrowedPool,
    LentPool,
    PairEnd,
    end_of_pair,
)
from megatron_bpipe.runtime.transport.pair.negotiate import Pair
from megatron_bpipe.runtime.transport.pair.several import (
    LentPools,
    OwnPool,
    RoutedTransport,
    named,
)
from megatron_bpipe.schedule.ops import HOST, Loan
from megatron_bpipe.schedule.stage_plan import StagePlan

Flops = Callable[[], float | None]
MIB = 2**20
# of the first micro-batch's bytes, where others may be larger; more would cost the acceptor memory,
# and what is still too much spills
HEADROOM = 1 / 8
COARSE = 1.5  # parts that one storage may be before the user is told: a bit more is no news


@dataclass
class StagePools:
    """This rank's pools as a stage of one pipeline.

    Attributes:
        options: what the user asked for.
        group: the pipeline's process group.
        store: what evicts, once a plan has evicted something.
        lent: the pool that this rank lends, once a plan has lent something.
        totals: bytes moved, by this pipeline's pairs of before too.
        peak_slots_lent: the most micro-batches that the partner has kept here.
        pair: the names of its pairs, once they are known.
    """

    options: Options
    group: weakref.ReferenceType[Any]
    store: ActivationStore | None = None
    lent: LentPools | None = None
    totals: Totals = field(default_factory=Totals)
    peak_slots_lent: int = 0
    pair: str = ""
    _transport: str = ""
    _borrowed: list[BorrowedPool | OwnPool] = field(default_factory=list)
    _routed: RoutedTransport | None = None
    _announced: bool = False
    _spill_told: bool = False
    _coarse_told: bool = False

    def begin(
        self,
        plan: StagePlan,
        previous: threading.Thread | None,
        recorder: Recorder | None,
        flops: Flops,
        sizes_vary: bool = False,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        """An iteration begins; waits for nobody.

        Args:
            plan: of this iteration.
            previous: gives back what an earlier pipeline kept, perhaps still.
            recorder: that is told which storages a load allocated.
            flops: gives those of one micro-batch's forward, if they are known.
            sizes_vary: micro-batches differ in how much they save.
            sizes: bytes that leave with one activation of each chunk, if they are known.
        """
        self.peak_slots_lent = max(self.peak_slots_lent, plan.slots_lent)
        if plan.lends and self.lent is None:
            early = plan.loans is not None
            self.lent = LentPools(
                {loan.evictor: LentPool(self._end(loan, previous), early) for loan in plan.lends}
            )
        if plan.borrows and self.store is None:
            headroom = HEADROOM if sizes_vary else 0.0
            self.store = self._borrow(plan, previous, recorder, flops, headroom, sizes or {})
        if self._routed is not None:
            self._routed.follow(plan.lender_of)
        if not plan.borrows:  # where it has no loans of its own rank 0 evicts if anybody does
            self._announce(plan, "")

    def _borrow(
        self,
        plan: StagePlan,
        previous: threading.Thread | None,
        recorder: Recorder | None,
        flops: Flops,
        headroom: float,
        sizes: Mapping[int, int],
    ) -> ActivationStore:
        """Begin to borrow from each lender; the store waits for them before its first eviction."""
        pools: dict[int, BorrowedPool | OwnPool] = {}
        whole = {chunk: (size,) for chunk, size in sizes.items()}
        for loan in plan.borrows:
            total = plan.pool_bytes(whole, loan.lender) if sizes else 0
            if loan.lender == HOST:
                options, device = self.options, torch.device(torch.cuda.current_device())
                size = int(total * (1 + headroom))
                pools[HOST] = OwnPool("host memory", size, device, options.deadline)
                continue
            pool = BorrowedPool(self._end(loan, previous), loan.slots, headroom)
            if sizes:
                pool.request(max(sizes.values()), total)
            pools[loan.lender] = pool
        self._borrowed = list(pools.values())

        def request(size: int, total: int | None) -> None:
            for pool in pools.values():
                if isinstance(pool, BorrowedPool):
                    pool.request(size, total)

        return ActivationStore(
            lambda size: self._connect(pools, plan, size, flops),
            request=request,
            pool_of=plan.pool_bytes,
            chunks=plan.chunks,
            parts=plan.parts,
            keep_local=self.options.keep_local,
            on_load=recorder.loaded if recorder is not None else None,
            totals=self.totals,
            sizes=dict(sizes),
        )

    def first_spill(self) -> str | None:
        """What to tell the user once, when evicted bytes have found no room in the pool."""
        transport = self.store.transport if self.store is not None else None
        if transport is None or self._spill_told or not transport.spilled_bytes:
            return None
        self._spill_told = True
        hosted = transport.hosted_bytes / MIB
        where = f"this rank's host memory ({hosted:.1f} MiB of it)" if hosted else "a longer pool"
        return (
            f"{transport.spilled_bytes / MIB:.1f} MiB of evicted activations found no room in the "
            f"pool and went to {where}: micro-batches are larger than the first one was. "
            "spilled_bytes in memory.json has the sum (--bpipe-report); if it grows, raise "
            "--bpipe-budget or make micro-batches alike (--moe-pad-expert-input-to-capacity)"
        )

    def coarse_parts(self) -> str | None:
        """What to tell the user once, where storages are much larger than the parts asked for."""
        if self._coarse_told or self.store is None or self.store.parts == 1:
            return None
        self._coarse_told = True
        seen = max(self.store.measured.values(), key=lambda one: one.block_in_parts, default=None)
        if seen is None or seen.block_in_parts <= COARSE:
            return None
        return (
            f"the largest storage of an activation has {seen.block / MIB:.2f} MiB, as much as "
            f"{seen.block_in_parts:.1f} of its {self.store.parts} parts. A storage is freed whole, "
            f"so this stage holds up to {seen.block / MIB:.2f} MiB more than --bpipe-budget says; "
            "use fewer --bpipe-parts, or 1 to move activations whole (docs/balance/parts.md)"
        )

    @property
    def transport(self) -> str:
        """Its pairs' transport; "" before both ends have agreed."""
        return self.lent.transport if self.lent is not None else self._transport

    def close(self) -> None:
        """Give pools and threads back; may wait until the partner has unmapped its own."""
        ends = (self.store, *self._borrowed, self.lent)
        self.store = self.lent = self._routed = None
        self._borrowed = []
        for end in ends:
            if end is not None:
                # the job may be going down: a store or a driver that is gone is no news then
                with contextlib.suppress(OSError, RuntimeError):
                    end.close()

    def _connect(
        self,
        pools: Mapping[int, BorrowedPool | OwnPool],
        plan: StagePlan,
        size: int,
        flops: Flops,
    ) -> Transport:
        """Before the first eviction: wait for the pools, and tell the user about them."""
        opened: dict[int, Transport] = {}
        pairs: list[Pair] = []
        for lender, pool in pools.items():
            if isinstance(pool, OwnPool):
                opened[lender] = pool.open()
                continue
            pair, opened[lender] = pool.open()
            pairs.append(pair)
            self._look_at(pair, opened[lender], size, flops)
        self._transport = named([*(p.transport for p in pairs), "host" if HOST in pools else ""])
        how = f", transport {self._transport}"
        if pairs:
            chosen = "chosen by auto: " if self.options.transport == AUTO else ""
            how += f" ({chosen}{'; '.join(dict.fromkeys(pair.why for pair in pairs))})"
        self._announce(plan, how)
        if plan.loans is None:
            return next(iter(opened.values()))
        self._routed = RoutedTransport(opened)
        self._routed.follow(plan.lender_of)
        return self._routed

    def _look_at(self, pair: Pair, transport: Transport, size: int, flops: Flops) -> None:
        """Say how fast a pair's link is or will be."""
        speed = None
        if self.options.measure_links and pair.spec.one_ended:
            speed = measure(transport, size, pair.device)
        lines = [
            _measured(pair, speed) if self.options.measure_links else None,
            forecast(pair.transport, pair.link, size, flops(), speed),
        ]
        for line in lines:
            if line is not None:
                log_rank(f"pair {pair.rendezvous.pair}: {line}")

    def _announce(self, plan: StagePlan, transport: str) -> None:
        if not self._announced:
            self._announced = True
            log_rank0(f"{plan.described}{transport}")

    def _end(self, loan: Loan, previous: threading.Thread | None) -> PairEnd:
        options, group = self.options, self.group()
        assert group is not None
        device = torch.device(torch.cuda.current_device())
        pair = loan.evictor, loan.lender
        end = end_of_pair(group, pair, options.transport, device, options.deadline, previous)
        self.pair = f"{self.pair}, {end.pair}" if self.pair else end.pair
        return end


def _measured(pair: Pair, speed: Speed | None) -> str:
    if speed is None:
        return (
            f"{pair.transport} needs both ends for every copy: its speed shows in the report's "
            "timeline"
        )
    return (
        f"{pair.transport} copies {speed.size / 2**20:.1f} MiB at {speed.out / 2**30:.1f} GiB/s "
        f"out and {speed.back / 2**30:.1f} GiB/s back"
    )


def sizes_vary(config: Any) -> bool:
    """Whether micro-batches may save more than the first one did, by Megatron's configuration."""
    experts = getattr(config, "num_moe_experts", None)
    padded = getattr(config, "moe_pad_expert_input_to_capacity", False)
    partly = getattr(config, "num_microbatches_with_partial_activation_checkpoints", None)
    variable = getattr(config, "variable_seq_lengths", False)
    return bool((experts and not padded) or variable or partly)
