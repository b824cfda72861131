"""What is special about the transports for GPUs, on the stand-in for streams and driver."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bpipe.integration.checks.driver import why_unusable
from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport import PoolRequest, TransportError
from megatron_bpipe.runtime.transport.cuda import ipc, messages
from megatron_bpipe.runtime.transport.cuda.driver import DriverError, free
from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies
from megatron_bpipe.runtime.transport.host.own import HostMemory
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.runtime.transport.pair import negotiate as pairing
from megatron_bpipe.runtime.transport.pair.bandwidth import measure
from megatron_bpipe.runtime.transport.pair.links import DeviceInfo, Link, PairTopology
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from tests.harness.stand_in_gpu import (
    NEEDS_COMPILER,
    bytes_of,
    forbid_ipc,
    set_capacity,
    set_devices,
    simulated_gpu,
)
from tests.harness.stand_in_gpu.ends import InProcess
from tests.runtime.test_store import gradients, micro_batch
from tests.runtime.transport.test_transports import groups_of_two, pieces, rendezvous_of_both

pytestmark = NEEDS_COMPILER
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ONE_GPU = PairTopology(
    DeviceInfo("a", ("a",)), DeviceInfo("a", ("a",)), one_host=True, link=Link.SAME_GPU
)
MIB = 2**20


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with simulated_gpu():
        yield
        set_capacity(2**40)
        forbid_ipc(False)
        assert bytes_of("allocated") == bytes_of("mapped") == bytes_of("pinned") == 0


class Agreement:
    """The acceptor's part of the agreement, in another process."""

    def __init__(self, asked: str, rendezvous: PairRendezvous) -> None:
        self.agreed = " ".join(pairing.agree(asked, ONE_GPU, rendezvous, CPU))
        self.pool_bytes = bytes_of("allocated")

    def close(self) -> None:
        """Nothing is left."""


def agree(asked: str, folder: Path) -> tuple[Any, InProcess]:
    here, there = rendezvous_of_both(dist.FileStore(str(folder / "store"), 2))
    other = InProcess(lambda: Agreement(asked, there))
    try:
        return pairing.agree(asked, ONE_GPU, here, CPU), other
    except TransportError as error:
        return error, other


def test_auto_tries_ipc_and_takes_it(tmp_path: Path) -> None:
    (transport, why), other = agree("auto", tmp_path)
    assert (transport, why) == ("ipc", "one GPU")
    assert other.ask("agreed") == "ipc one GPU"
    assert other.pool_bytes == 0  # the trial is over
    other.close()


def test_auto_goes_on_where_ipc_is_forbidden(tmp_path: Path) -> None:
    forbid_ipc(True)
    (transport, why), other = agree("auto", tmp_path)
    assert transport == "host"
    assert "CUDA IPC was tried and failed: cuIpcOpenMemHandle_v2: operation not supported" in why
    assert other.ask("agreed").startswith("host")
    other.close()


def test_asked_for_by_name_both_ends_refuse(tmp_path: Path) -> None:
    forbid_ipc(True)
    error, other = agree("ipc", tmp_path)
    assert "--bpipe-transport ipc, but CUDA IPC was tried and failed" in str(error)
    with pytest.raises(RuntimeError, match="operation not supported"):
        other.ask("agreed")
    other.close()


def test_a_pool_that_does_not_fit_names_both_numbers() -> None:
    set_capacity(10_000)
    _, there = rendezvous_of_both()
    wanted = r"pair 0-1: no room for a pool of 4194304 bytes .* 10000 of 10000 bytes are free"
    with pytest.raises(TransportError, match=wanted):
        ipc.IpcAcceptor(there, PoolRequest(2 * MIB, 2), CPU)


def test_slots_that_do_not_fit_name_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capacity(10_000)

    def full(*size: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(TransportError, match=r"1 slots of 65536 bytes .* 10000 bytes are free"):
        messages.NcclAcceptor(None, "0-1", PoolRequest(65536, 3), CPU)


@pytest.fixture
def lent() -> tuple[ipc.IpcAcceptor, PairRendezvous]:
    """An acceptor's end, and the evictor's side of its rendezvous."""
    here, there = rendezvous_of_both()
    return ipc.IpcAcceptor(there, PoolRequest(2 * MIB, 2), CPU), here


def test_the_acceptor_frees_after_the_evictor_has_unmapped(lent: Any) -> None:
    acceptor_end, evictor = lent
    closing = threading.Thread(target=acceptor_end.close)
    closing.start()
    closing.join(0.3)
    assert bytes_of("allocated") == acceptor_end.pool_bytes == 4 * MIB
    evictor.publish("unmapped", "")
    closing.join(5)
    assert bytes_of("allocated") == acceptor_end.pool_bytes == 0


def test_the_acceptor_keeps_what_may_still_be_mapped(
    lent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "SECONDS_TO_UNMAP", 0.1)
    acceptor_end, evictor = lent
    acceptor_end.close()
    assert bytes_of("allocated") == 4 * MIB
    evictor.publish("unmapped", "")
    acceptor_end.close()


def test_it_is_unmapped_and_unpinned(tmp_path: Path) -> None:
    here, there = rendezvous_of_both(dist.FileStore(str(tmp_path / "store"), 2))
    other = InProcess(lambda: ipc.IpcAcceptor(there, PoolRequest(4096, 1), CPU))
    memory = ipc.IpcMemory(here, other.ask("offer"), GPU)
    transport = OneSidedTransport("0-1", memory, StreamCopies(CPU))
    transport._memory._device = CPU  # pins as on a GPU, maps for tensors on the CPU
    transport.evict(0, pieces(0, 3000)).wait()
    transport.evict(1, pieces(1, 3 * MIB)).wait()
    assert bytes_of("mapped") == 2 * MIB  # of whole pages
    assert bytes_of("pinned") == transport.hosted_bytes > 0
    assert transport.spilled_bytes == MIB + 3072  # what the first takes in the pool, in blocks
    said_at: dict[str, int] = {}  # bytes mapped when something was said
    tell = here.publish

    def noted(what: str, value: str) -> None:
        said_at[what] = bytes_of("mapped")
        tell(what, value)

    here.publish = noted  # type: ignore[method-assign]
    transport.close()
    assert said_at == {"unmapped": 0}  # the acceptor frees the pool when it hears that
    assert bytes_of("mapped") == bytes_of("pinned") == 0
    other.close()


def test_an_acceptor_that_dies_is_named(tmp_path: Path) -> None:
    here, there = rendezvous_of_both(dist.FileStore(str(tmp_path / "store"), 2))

    def lend() -> ipc.IpcAcceptor:
        there.exchange_identity()
        return ipc.IpcAcceptor(there, PoolRequest(65536, 1), CPU)

    other = InProcess(lend)
    here.exchange_identity()
    transport = ipc.ipc_transport(here, other.ask("offer"), CPU)
    transport.evict(0, pieces(0, 100)).wait()
    pid = other.process.pid
    other.process.kill()
    other.process.join()
    with pytest.raises(TransportError, match=rf"pair 0-1: the acceptor \(pid {pid}\) died"):
        transport.evict(1, pieces(0, 100))
    transport.close()


def test_speed_is_measured_through_it(tmp_path: Path) -> None:
    here, there = rendezvous_of_both(dist.FileStore(str(tmp_path / "store"), 2))
    other = InProcess(lambda: ipc.IpcAcceptor(there, PoolRequest(MIB, 1), CPU))
    transport = ipc.ipc_transport(here, other.ask("offer"), CPU)
    speed = measure(transport, MIB, CPU)
    assert speed.size == MIB
    assert min(speed.out, speed.back) > 0
    assert transport.occupied_bytes == 0
    transport.close()
    other.close()


@pytest.fixture
def store() -> Iterator[ActivationStore]:
    """Over pinned host memory."""
    made = ActivationStore(
        lambda size: OneSidedTransport("0-1", HostMemory("0-1", size, GPU), StreamCopies(CPU))
    )
    yield made
    made.close()


def test_what_is_freed_may_be_overwritten_at_once(store: ActivationStore) -> None:
    """Copies run as late as the events allow, so one that is not waited for copies garbage."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(12, 4))
    expected = {i: gradients(*micro_batch(weight, i, rows=64), weight) for i in range(3)}
    for i in range(3):
        x, output = micro_batch(weight, i, rows=64)
        store.measure(i, output)
        store.capture(i, output)
        moved = store.evict(i)
        store.finish_evict(i)
        garbage = [torch.full((n,), float("nan")) for n in (6144, 8192, 24576, 32768) * 4]
        del garbage
        store.load(i)
        store.finish_load(i)
        assert moved > 0
        actual = gradients(x, output, weight)
        store.consume(i)
        assert all(map(torch.equal, actual, expected[i]))
    store.check_empty()


def test_a_load_that_is_not_waited_for_would_be_seen(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with the wait taken away the test before would fail."""
    from megatron_bpipe.runtime.transport.cuda.streams import StreamTransferHandle

    weight = torch.nn.Parameter(torch.ones(12, 4))
    expected = gradients(*micro_batch(weight), weight)
    x, output = micro_batch(weight)
    store.measure(0, output)
    store.capture(0, output)
    store.evict(0)
    store.finish_evict(0)
    abandoned: list[StreamTransferHandle] = []  # they keep the memory that is copied to
    monkeypatch.setattr(StreamTransferHandle, "wait", lambda transfer: abandoned.append(transfer))
    store.load(0)
    store.finish_load(0)
    assert not all(map(torch.equal, gradients(x, output, weight), expected))
    store.close()


def test_nccl_slots_grow_with_a_later_iteration() -> None:
    groups = groups_of_two(*rendezvous_of_both())
    request = PoolRequest(4096, 1)
    with ThreadPoolExecutor(1) as other, simulated_gpu(late=False):
        transport = messages.NcclTransport(groups[0], "0-1", request, CPU)
        acceptor_end = messages.NcclAcceptor(groups[1], "0-1", request, CPU)
        sent = {i: pieces(i, 4096) for i in range(3)}
        for i, parts in sent.items():
            accepted = other.submit(acceptor_end.accept, i)
            transport.evict(i, parts).wait()
            accepted.result(20)
        assert acceptor_end.pool_bytes == 3 * 4096
        with pytest.raises(TransportError, match=r"micro-batches \[0, 1, 2\] are left"):
            acceptor_end.finish()
        for i in (1, 0, 2):
            given = other.submit(acceptor_end.give_back, i)
            back = [torch.zeros_like(part) for part in sent[i]]
            transport.load(i, back).wait()
            transport.release(i)
            given.result(20)
            assert all(map(torch.equal, back, sent[i]))
        acceptor_end.finish()
        transport.close()
        acceptor_end.close()


def test_the_driver_s_error_names_the_call() -> None:
    with pytest.raises(DriverError, match=r"cuMemFree_v2: another error \(1\)"):
        free(4096)


def test_gpus_that_torch_cannot_use_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert why_unusable() is None  # the driver shows none
    with simulated_gpu(release=12040):
        set_devices(2)
        said = why_unusable()
        set_devices(0)
    assert said is not None
    assert "2 GPU(s)" in said
    assert "built for CUDA 13.0" in said
    assert "the driver's CUDA is 12.4" in said
    assert "CUDA_VISIBLE_DEVICES=" in said


def test_a_torch_without_cuda_is_a_wish_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    set_devices(2)
    assert why_unusable() is None
    set_devices(0)
