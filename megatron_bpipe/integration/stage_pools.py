"""What one rank keeps for one pipeline: the pool it borrows or lends, and its evicted bytes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bpipe.integration.link_forecast import forecast
from megatron_bpipe.integration.log import log_rank, log_rank0
from megatron_bpipe.integration.options import Options
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.runtime.store import ActivationStore
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
from megatron_bpipe.schedule.stage_plan import StagePlan

Flops = Callable[[], float | None]
MIB = 2**20
# of the first micro-batch's bytes, where others may be larger; more would cost the acceptor memory,
# and what is still too much spills
HEADROOM = 1 / 8


@dataclass
class StagePools:
    """This rank's pools as a stage of one pipeline.

    Attributes:
        options: what the user asked for.
        group: the pipeline's process group.
        store: what evicts, once a plan has evicted something.
        lent: the pool that this rank lends, once a plan has lent something.
        peak_slots_lent: the most micro-batches that the partner has kept here.
        pair: the pair's name, once it is known.
    """

    options: Options
    group: weakref.ReferenceType[Any]
    store: ActivationStore | None = None
    lent: LentPool | None = None
    peak_slots_lent: int = 0
    pair: str = ""
    _transport: str = ""
    _borrowed: BorrowedPool | None = None
    _announced: bool = False
    _spill_told: bool = False

    def begin(
        self,
        plan: StagePlan,
        previous: threading.Thread | None,
        recorder: Recorder | None,
        flops: Flops,
        sizes_vary: bool = False,
    ) -> None:
        """An iteration begins; waits for nobody.

        Args:
            plan: of this iteration.
            previous: gives back what an earlier pipeline kept, perhaps still.
            recorder: that is told which storages a load allocated.
            flops: gives those of one micro-batch's forward, if they are known.
            sizes_vary: micro-batches differ in how much they save.
        """
        self.peak_slots_lent = max(self.peak_slots_lent, plan.slots_lent)
        if plan.slots_lent and self.lent is None:
            self.lent = LentPool(self._end(plan, previous))
        if plan.slots_borrowed and self.store is None:
            headroom = HEADROOM if sizes_vary else 0.0
            pool = BorrowedPool(self._end(plan, previous), plan.slots_borrowed, headroom)
            self._borrowed = pool
            self.store = ActivationStore(
                lambda size: self._connect(pool, plan, size, flops),
                request=pool.request,
                pool_of=plan.pool_bytes,
                chunks=plan.chunks,
                keep_local=self.options.keep_local,
                on_load=recorder.loaded if recorder is not None else None,
            )
        if not plan.slots_borrowed:  # rank 0 evicts in every schedule that evicts at all
            self._announce(plan, "")

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

    @property
    def transport(self) -> str:
        """The pair's transport; "" before both ends have agreed."""
        return self.lent.transport if self.lent is not None else self._transport

    def close(self) -> None:
        """Give pools and threads back; may wait until the partner has unmapped its own."""
        ends = (self.store, self._borrowed, self.lent)
        self.store = self._borrowed = self.lent = None
        for end in ends:
            if end is not None:
                # the job may be going down: a store or a driver that is gone is no news then
                with contextlib.suppress(OSError, RuntimeError):
                    end.close()

    def _connect(self, pool: BorrowedPool, plan: StagePlan, size: int, flops: Flops) -> Transport:
        """Before the first eviction: wait for the pool, and tell the user about it."""
        pair, transport = pool.open()
        self._transport = pair.transport
        asked = self.options
        chosen = "chosen by auto: " if asked.transport == AUTO else ""
        self._announce(plan, f", transport {pair.transport} ({chosen}{pair.why})")
        speed = None
        if asked.measure_links and pair.spec.one_ended:
            speed = measure(transport, size, pair.device)
        lines = [
            _measured(pair, speed) if asked.measure_links else None,
            forecast(pair.transport, pair.link, size, flops(), speed),
        ]
        for line in lines:
            if line is not None:
                log_rank(f"pair {self.pair}: {line}")
        return transport

    def _announce(self, plan: StagePlan, transport: str) -> None:
        if not self._announced:
            self._announced = True
            log_rank0(f"{plan.described}{transport}")

    def _end(self, plan: StagePlan, previous: threading.Thread | None) -> PairEnd:
        options, group = self.options, self.group()
        assert group is not None
        assert plan.partner is not None
        evictor = group.rank() if plan.slots_borrowed else plan.partner
        device = torch.device(torch.cuda.current_device())
        end = end_of_pair(group, evictor, options.transport, device, options.deadline, previous)
        self.pair = end.pair
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
