"""The pair's messages over NCCL where every GPU has one hardware queue: all of it comes to an end.

The schedule is the one that runs, the ends of the transport are the real ones, and no host waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from megatron_bpipe.runtime.transport import PoolRequest
from megatron_bpipe.runtime.transport.cuda import messages
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec
from megatron_bpipe.schedule.lowering.batches import batches
from megatron_bpipe.schedule.ops import Kind, Op
from megatron_bpipe.schedule.stage_plan import StagePlan, stage_plan
from tests.harness.stand_in_gpu import NEEDS_COMPILER, simulated_gpu
from tests.harness.stand_in_gpu.one_queue import Device, Group, Machines, on

pytestmark = NEEDS_COMPILER
CPU = torch.device("cpu")
CHUNK, SLOT = 1024, 3072
SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
MESSAGES = (*SENDS, Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(messages, "CHUNK", CHUNK)
    with simulated_gpu():
        yield


def neighbour(op: Op, stage: int, stages: int) -> int:
    below = op.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
    return (stage + (1 if below else -1)) % stages  # from one chunk to the next around the ring


def issue(device: Device, plan: StagePlan, stage: int, stages: int, ops: Sequence[Op]) -> None:
    """What the host of one stage gives its GPU in an iteration."""
    with on(device) as computing:
        pipeline = Group("the pipeline", stage)
        pair = min(stage, stages - 1 - stage)
        request = PoolRequest(SLOT, max(plan.slots_borrowed, plan.slots_lent, 1))
        evictor = acceptor = None
        if plan.slots_borrowed:
            evictor = messages.NcclTransport(Group(f"pair {pair}", 0), "", request, CPU)
        if plan.slots_lent:
            acceptor = messages.NcclAcceptor(Group(f"pair {pair}", 1), "", request, CPU)
        pieces = [torch.zeros(n, dtype=torch.uint8) for n in (900, 700, 1000)]
        under_way = {}
        for group in batches(ops):
            first = group[0]
            if first.kind in MESSAGES:
                to = [neighbour(op, stage, stages) for op in group if op.kind in SENDS]
                of = [neighbour(op, stage, stages) for op in group if op.kind not in SENDS]
                pipeline.exchange(to, of).wait()
            elif first.kind in (Kind.FORWARD, Kind.BACKWARD):
                device.put(computing, str(first))
            elif first.kind is Kind.EVICT:
                assert evictor is not None
                under_way[first.key] = evictor.evict(first.key, pieces)
            elif first.kind is Kind.LOAD:
                assert evictor is not None
                under_way[first.key] = evictor.load(first.key, pieces)
            elif first.kind in (Kind.EVICT_WAIT, Kind.LOAD_WAIT):
                under_way.pop(first.key).wait()
                if first.kind is Kind.LOAD_WAIT:
                    assert evictor is not None
                    evictor.release(first.key)
            else:
                assert acceptor is not None
                act: Callable[..., None] = (
                    acceptor.accept if first.kind is Kind.ACCEPT else acceptor.give_back
                )
                act(first.key)


def left_over(
    spec: ScheduleSpec,
    *,
    strict: bool = False,
    change: Callable[[int, list[Op]], list[Op]] = lambda stage, ops: ops,
) -> list[str]:
    """What does not get on in an iteration of the whole pipeline."""
    machines, evicted = Machines(strict), 0
    for stage in range(spec.p):
        device = Device(machines, stage)
        machines.devices.append(device)
        plan = stage_plan(spec, stage)
        evicted += sum(op.kind is Kind.EVICT for op in plan.ops)
        issue(device, plan, stage, spec.p, change(stage, list(plan.ops)))
    assert evicted > 0
    return machines.run()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("stages", "more"), [(4, 0), (4, 9), (6, 6), (8, 1)])
def test_an_iteration_comes_to_an_end(stages: int, more: int, strict: bool) -> None:
    spec = ScheduleSpec("1f1b", stages, stages + more, chunks=1, balanced=True)
    assert left_over(spec, strict=strict) == []


@pytest.mark.parametrize("strict", [False, True])
def test_interleaved_chunks_come_to_an_end_too(strict: bool) -> None:
    spec = ScheduleSpec("interleaved", 4, 8, chunks=2, balanced=True)
    assert left_over(spec, strict=strict) == []


def test_a_receive_that_comes_too_late_would_be_seen() -> None:
    def late(stage: int, ops: list[Op]) -> list[Op]:
        """The last stage posts its first receive after everything else."""
        first = next((op for op in ops if op.kind is Kind.ACCEPT), None)
        if stage != 3 or first is None:
            return ops
        i = ops.index(first)
        returned = next(op for op in ops if op.kind is Kind.RETURN and op.key == first.key)
        rest = [op for op in ops[:i] + ops[i + 1 :] if op is not returned]
        return [*rest, first, returned]

    spec = ScheduleSpec("1f1b", 4, 8, chunks=1, balanced=True)
    assert left_over(spec, change=late) != []
