"""What every transport must do, whichever way its bytes travel.

``ipc`` and ``nccl`` run on a stand-in for the GPU (tests/harness/stand_in_gpu), nccl's messages
over gloo.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bpipe.runtime.observe.memory import allocated_bytes
from megatron_bpipe.runtime.transport import AcceptorEnd, PoolRequest, Transport, TransportError
from megatron_bpipe.runtime.transport.cuda.ipc import IpcAcceptor, ipc_transport
from megatron_bpipe.runtime.transport.cuda.messages import NcclAcceptor, NcclTransport
from megatron_bpipe.runtime.transport.host import memory as host_memory
from megatron_bpipe.runtime.transport.host.own import NoPool, host_transport
from megatron_bpipe.runtime.transport.pair.negotiate import two_sided_group
from megatron_bpipe.runtime.transport.pair.rendezvous import Identity, PairRendezvous, _born
from megatron_bpipe.runtime.transport.shared_memory import (
    SharedMemoryAcceptor,
    shared_memory_transport,
)
from megatron_bpipe.runtime.transport.two_sided import TwoSidedAcceptor, TwoSidedTransport
from tests.harness.stand_in_gpu import NEEDS_COMPILER, simulated_gpu
from tests.harness.stand_in_gpu.ends import OnThread

CPU = torch.device("cpu")
DEADLINE = 20.0
MIB = 2**20
TRANSPORTS = (
    *("shm", "host", "p2p"),
    *(pytest.param(name, marks=NEEDS_COMPILER) for name in ("ipc", "nccl")),
)


@dataclass
class Ends:
    """Both ends of a pair in one process."""

    name: str
    evictor: Transport
    acceptor: AcceptorEnd

    def evict(self, i: int, pieces: list[torch.Tensor]) -> None:
        self.acceptor.accept(i)
        self.evictor.evict(i, pieces).wait()

    def load(self, i: int, pieces: list[torch.Tensor]) -> None:
        self.acceptor.give_back(i)
        self.evictor.load(i, pieces).wait()
        self.evictor.release(i)


def rendezvous_of_both(store: Any = None) -> tuple[PairRendezvous, PairRendezvous]:
    store = store if store is not None else dist.HashStore()
    return tuple(PairRendezvous(store, "0-1", end, DEADLINE) for end in ("evictor", "acceptor"))


def groups_of_two(*ends: PairRendezvous) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda end: two_sided_group(end, CPU), ends))


def open_ends(name: str, wanted: int) -> Ends:
    if name == "host":
        return Ends(name, host_transport("0-1", wanted, CPU, DEADLINE), NoPool())
    here, there = rendezvous_of_both()
    request = PoolRequest(wanted // 2, 2)
    if name == "ipc":
        acceptor_end = IpcAcceptor(there, request, CPU)
        return Ends(name, ipc_transport(here, acceptor_end.offer, CPU), acceptor_end)
    if name == "shm":
        acceptor_end = SharedMemoryAcceptor("0-1", request)
        return Ends(name, shared_memory_transport(here, acceptor_end.offer), acceptor_end)
    groups = groups_of_two(here, there)
    if name == "nccl":
        acceptor_end = OnThread(lambda: NcclAcceptor(groups[1], "0-1", request, CPU))
        return Ends(name, NcclTransport(groups[0], "0-1", request, CPU), acceptor_end)
    acceptor_end = TwoSidedAcceptor(groups[1], "0-1", CPU, DEADLINE)
    return Ends(name, TwoSidedTransport(groups[0], "0-1", DEADLINE), acceptor_end)


@pytest.fixture(params=TRANSPORTS)
def open_pair(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Ends]]:
    opened = []
    gpu = request.param in ("ipc", "nccl")
    # gloo sends when it is called, without regard to streams, so what is packed must be there
    late = request.param == "ipc"
    stand_in = simulated_gpu(late=late, one_process=True) if gpu else contextlib.nullcontext()

    def opener(wanted: int) -> Ends:
        opened.append(open_ends(request.param, wanted))
        return opened[-1]

    with stand_in:
        yield opener
        for ends in opened:
            ends.evictor.close()
            ends.acceptor.close()


def pieces(seed: int, *sizes: int) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=dice) for n in sizes]


def test_bytes_come_back_as_they_left(open_pair: Callable[[int], Ends]) -> None:
    ends = open_pair(64 * 2**10)
    sizes = (1, 511, 512, 513, 7_000, 40_000)
    out = pieces(0, *sizes)
    back = [torch.zeros_like(piece) for piece in out]
    ends.evict(3, out)
    assert ends.evictor.occupied_bytes >= sum(sizes)
    ends.load(3, back)
    assert all(map(torch.equal, back, out))
    assert ends.evictor.occupied_bytes == 0
    ends.acceptor.finish()


def test_what_is_forgotten_leaves_its_room(open_pair: Callable[[int], Ends]) -> None:
    """Both ends forget: nothing is left over, and others take the place."""
    ends = open_pair(64 * 2**10)
    ends.evict(3, pieces(0, 30_000))
    ends.evict(4, pieces(1, 30_000))
    ends.evictor.release(3)
    ends.evictor.release(4)
    ends.acceptor.forget()
    ends.acceptor.finish()
    assert ends.evictor.occupied_bytes == 0
    lent = ends.acceptor.pool_bytes
    out, back = pieces(2, 30_000), [torch.zeros(30_000, dtype=torch.uint8)]
    for i in (5, 6, 7):
        ends.evict(i, out)
        ends.load(i, back)
    assert torch.equal(back[0], out[0])
    assert ends.acceptor.pool_bytes == lent
    ends.acceptor.finish()


def test_a_micro_batch_with_nothing_to_move(open_pair: Callable[[int], Ends]) -> None:
    """As the first, which says how large the pool is, and between others."""
    ends = open_pair(0)
    out = pieces(0, 100)
    back = [torch.zeros_like(out[0])]
    ends.evict(0, [])
    ends.evict(1, out)
    ends.evict(2, [])
    for i in (2, 0):
        ends.load(i, [])
    ends.load(1, back)
    assert torch.equal(back[0], out[0])
    assert ends.evictor.occupied_bytes == 0
    ends.acceptor.finish()


def test_any_order_and_room_is_used_again(open_pair: Callable[[int], Ends]) -> None:
    ends = open_pair(2 * 4 * MIB)
    expected = {i: pieces(i, MIB, 3 * MIB) for i in range(12)}
    waiting: list[int] = []
    for i in range(12):
        ends.evict(i, expected[i])
        waiting.append(i)
        if len(waiting) == 2:
            come = waiting.pop(i % 2)
            back = [torch.zeros_like(piece) for piece in expected[come]]
            ends.load(come, back)
            assert all(map(torch.equal, back, expected[come]))
    (last,) = waiting
    ends.load(last, expected[last])
    ends.acceptor.finish()
    lent = ends.acceptor.pool_bytes + ends.evictor.hosted_bytes
    assert 0 < lent <= 4 * 4 * MIB


def test_a_micro_batch_larger_than_the_pool_travels_too(open_pair: Callable[[int], Ends]) -> None:
    ends = open_pair(2 * MIB)
    small, large = pieces(0, 3 * MIB // 2), pieces(1, 25 * MIB, 17)
    ends.evict(0, small)
    ends.evict(1, large)
    back = [torch.zeros_like(piece) for piece in large]
    ends.load(1, back)
    assert all(map(torch.equal, back, large))
    ends.load(0, small)
    ends.acceptor.finish()


def test_a_handle_tells_when_the_copy_ran(open_pair: Callable[[int], Ends]) -> None:
    ends = open_pair(MIB)
    ends.acceptor.accept(0)
    transfer = ends.evictor.evict(0, pieces(0, MIB))
    transfer.wait()
    start, end = transfer.span
    assert 0 < start <= end
    assert 0 <= transfer.exposed < DEADLINE


def test_who_pays_for_the_memory(open_pair: Callable[[int], Ends]) -> None:
    ends = open_pair(MIB)
    ends.evict(0, pieces(0, MIB // 2))
    hosted, lent = ends.evictor.hosted_bytes, ends.acceptor.pool_bytes
    if ends.name == "host":
        assert (hosted, lent) == (MIB, 0)
    else:
        assert hosted == 0
        assert lent >= MIB // 2


@pytest.mark.parametrize("name", ["shm", "host"])
def test_the_pool_is_not_in_the_allocator_s_books(name: str) -> None:
    before = allocated_bytes(CPU)
    if before is None:
        pytest.skip("this C library does not say what malloc gave out")
    ends = open_ends(name, 64 * MIB)
    ends.evict(0, pieces(0, 4096))
    after = allocated_bytes(CPU)
    ends.evictor.close()
    ends.acceptor.close()
    assert after is not None
    assert after - before < 8 * MIB


def test_host_memory_is_given_back() -> None:
    def mapped() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    ends = open_ends("host", 64 * MIB)
    ends.evict(0, pieces(0, 4096))
    during = mapped()
    ends.evictor.close()
    assert during - mapped() >= 60 * MIB


@pytest.mark.parametrize("name", ["shm", "host"])
def test_no_memory_for_the_pool_names_both_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 12_345)

    def ask() -> None:
        if name == "shm":
            SharedMemoryAcceptor("0-1", PoolRequest(32_768, 2))
        else:
            host_transport("0-1", 65_536, CPU, DEADLINE)

    with pytest.raises(TransportError, match=r"pair 0-1.*65536 bytes.*12345 bytes available"):
        ask()


def test_a_dead_acceptor_is_named_at_the_next_eviction() -> None:
    here, _ = rendezvous_of_both()
    process = subprocess.Popen(["sleep", "60"])
    here.peer = replace(Identity.mine(), pid=process.pid, born=_born(process.pid))
    acceptor_end = SharedMemoryAcceptor("0-1", PoolRequest(65_536, 1))
    transport = shared_memory_transport(here, acceptor_end.offer)
    transport.evict(0, pieces(0, 100)).wait()
    process.kill()
    process.wait()
    with pytest.raises(TransportError, match=rf"pair 0-1: the acceptor \(pid {process.pid}\) died"):
        transport.evict(1, pieces(0, 100))
    transport.close()
    acceptor_end.close()
