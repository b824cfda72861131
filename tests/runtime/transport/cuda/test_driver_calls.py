"""How many calls of the driver an eviction and a load take: on a GPU they are the host's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport.base import TransferHandle
from megatron_bpipe.runtime.transport.cuda import driver
from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies
from megatron_bpipe.runtime.transport.host.own import HostMemory
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.schedule.ops import ActivationKey
from tests.harness.stand_in_gpu import NEEDS_COMPILER, number, simulated_gpu, streams
from tests.runtime.test_store import gradients
from tests.runtime.transport.test_transports import pieces

pytestmark = NEEDS_COMPILER
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MOST = 10  # calls of the driver an op, torch's events among them
KEY = ActivationKey(0)


def pinned_host(size: int) -> OneSidedTransport:
    return OneSidedTransport("0-1", HostMemory("0-1", size, GPU), StreamCopies(CPU))


def calls_of(action: Callable[[], object]) -> tuple[int, int]:
    """Calls of the driver: all, and those that copy."""
    number("copy_calls", 0)
    streams.calls.clear()
    action()
    copies = number("copy_calls")
    return copies + sum(streams.calls.values()), copies


@pytest.fixture(params=[13000, 12080, 12040])
def release(request: pytest.FixtureRequest) -> Iterator[int]:
    with simulated_gpu(release=request.param):
        yield request.param


@pytest.mark.parametrize("storages", [3, 400])
def test_calls_of_one_eviction_and_one_load(release: int, storages: int) -> None:
    transport = pinned_host(2**20)
    out = pieces(0, *(100 + i for i in range(storages)))
    back = [torch.zeros_like(piece) for piece in out]
    handles: list[TransferHandle] = []
    for direction, what in ((transport.evict, out), (transport.load, back)):
        all_calls, copies = calls_of(lambda go=direction, w=what: handles.append(go(KEY, w)))
        if release >= 12080:
            assert copies == 1
            assert all_calls <= MOST
        else:
            assert copies == storages
        assert calls_of(handles[-1].wait)[0] <= MOST
    transport.release(KEY)
    transport.close()
    assert all(map(torch.equal, back, out))


def test_a_whole_op_of_the_store(release: int) -> None:
    """Through what the executor calls, however many layers there are."""
    counted = {}
    for layers in (2, 24):
        weight = torch.nn.Parameter(torch.randn(16, 16))
        x = torch.randn(8, 16).requires_grad_()
        hidden = x * 1.0
        for _ in range(layers):
            hidden = torch.nn.functional.gelu(hidden @ weight)
        output = hidden.sum()
        store = ActivationStore(pinned_host)
        store.measure(KEY, output)
        store.capture(KEY, output)
        counted[layers] = [
            calls_of(lambda op=op: op(KEY))[0]
            for op in (store.evict, store.finish_evict, store.load, store.finish_load)
        ]
        gradients(x, output, weight)
        store.consume(KEY)
        store.close()
    if release >= 12080:
        assert max(counted[24]) <= MOST
        assert counted[2] == counted[24]
    else:
        assert max(counted[24]) > MOST  # that is what the batched call saves


def test_a_driver_that_takes_no_batch_of_these_copies_gets_them_one_by_one() -> None:
    with simulated_gpu(release=12080):
        assert driver.copies_in_one_call() == "cuMemcpyBatchAsync"
        number("batch_refused", 1)
        transport = pinned_host(2**20)
        out = pieces(0, 100, 2000, 3)
        back = [torch.zeros_like(piece) for piece in out]
        counted = [calls_of(lambda: transport.evict(KEY, out))[1]]
        counted.append(calls_of(lambda: transport.load(KEY, back).wait())[1])
        number("batch_refused", 0)
        transport.release(KEY)
        transport.close()
    assert counted == [1 + 3, 3]  # asked once
    assert all(map(torch.equal, back, out))


def test_copies_share_no_stream_with_messages() -> None:
    """torch deals its streams in turn, and NCCL's process groups draw from the first pool."""
    with simulated_gpu():
        copies = [StreamCopies(CPU).stream.cuda_stream for _ in range(3)]
        of_messages = {torch.cuda.Stream(GPU).cuda_stream for _ in range(100)}
        of_urgent_messages = {torch.cuda.Stream(GPU, priority=-3).cuda_stream for _ in range(100)}
    assert len(of_messages) == streams.STREAMS_A_PRIORITY
    assert not of_messages.intersection(copies)
    assert not of_urgent_messages.intersection(copies)
