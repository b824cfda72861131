"""A pool lent by another process through CUDA IPC; both on one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_bpipe.runtime.transport import Transport, TransportError
from megatron_bpipe.runtime.transport.cuda.ipc import GRANULE
from megatron_bpipe.runtime.transport.pair.handshake import BorrowedPool, PairEnd
from megatron_bpipe.runtime.transport.pair.negotiate import Pair
from tests.gpu import NEEDS_GPU
from tests.gpu.acceptor import end_of
from tests.harness import ROOT

pytestmark = NEEDS_GPU
MIB = 2**20
Process = subprocess.Popen[str]
Acceptor = Callable[[], tuple[PairEnd, Process]]


@pytest.fixture
def acceptor(tmp_path: Path) -> Iterator[Acceptor]:
    """Starts an acceptor; gives the evictor's end of the pair."""
    started = []

    def start() -> tuple[PairEnd, Process]:
        store = tmp_path / f"store{len(started)}"
        command = [sys.executable, "-m", "tests.gpu.acceptor", str(store)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return end_of(str(store), "evictor"), process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def borrow(end: PairEnd, microbatch_bytes: int, slots: int) -> tuple[Pair, Transport]:
    pool = BorrowedPool(end, slots)
    pool.request(microbatch_bytes)
    return pool.open()


def pieces(seed: int, *sizes: int) -> list[torch.Tensor]:
    dice = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda", generator=dice) for n in sizes
    ]


def test_auto_tries_ipc_and_takes_it(acceptor: Acceptor) -> None:
    end, _ = acceptor()
    pair, transport = borrow(end, MIB, 1)
    transport.close()
    assert pair.transport == "ipc", pair.why
    assert pair.why.startswith("one GPU")


def test_bytes_come_back_and_the_pool_is_freed(acceptor: Acceptor) -> None:
    end, process = acceptor()
    _, transport = borrow(end, 96 * MIB, 2)
    sizes = (1, 511, 513, 7_000, 64 * MIB)
    expected = {i: pieces(i, *sizes) for i in range(3)}
    for i in range(3):
        transport.evict(i, expected[i]).wait()
        back = [torch.zeros_like(piece) for piece in expected[i]]
        transport.load(i, back).wait()
        transport.release(i)
        assert all(map(torch.equal, back, expected[i]))
    assert transport.occupied_bytes == transport.hosted_bytes == 0
    assert int(end.store.get("pool")) == 2 * 96 * MIB
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    transport.close()
    end.store.set("done", "")
    end.store.get("closed")
    after, _ = torch.cuda.mem_get_info()
    assert after - before >= 128 * MIB
    assert process.wait(60) == 0


def test_a_larger_micro_batch_goes_to_the_host(acceptor: Acceptor) -> None:
    end, _ = acceptor()
    _, transport = borrow(end, 4 * MIB, 1)
    small, large = pieces(0, 3 * MIB), pieces(1, 20 * MIB, 17)
    transport.evict(0, small).wait()
    transport.evict(1, large).wait()
    assert 20 * MIB > transport.hosted_bytes >= 19 * MIB  # what is too much, no more
    assert transport.spilled_bytes >= 19 * MIB
    for i, expected in ((1, large), (0, small)):
        back = [torch.zeros_like(piece) for piece in expected]
        transport.load(i, back).wait()
        transport.release(i)
        assert all(map(torch.equal, back, expected))
    transport.close()


def test_a_pool_that_does_not_fit_names_both_numbers(acceptor: Acceptor) -> None:
    end, process = acceptor()
    _, total = torch.cuda.mem_get_info()
    with pytest.raises(TransportError, match="no room for a pool"):
        borrow(end, 2 * total, 1)
    assert process.wait(60) == 3
    assert process.stderr is not None
    said = process.stderr.read()
    asked = -(-2 * total // GRANULE) * GRANULE
    assert f"no room for a pool of {asked} bytes" in said
    assert f"of {total} bytes are free" in said


def test_an_acceptor_that_dies_is_named(acceptor: Acceptor) -> None:
    end, process = acceptor()
    _, transport = borrow(end, 8 * MIB, 1)
    transport.evict(0, pieces(0, MIB)).wait()
    torch.cuda.synchronize()
    process.kill()
    process.wait()
    begun = time.monotonic()
    with pytest.raises(TransportError, match=r"pair 0-1: the acceptor .* died"):
        transport.evict(1, pieces(1, MIB))
    assert time.monotonic() - begun < 5


def test_nothing_is_left_in_dev_shm(acceptor: Acceptor) -> None:
    def ours() -> set[str]:
        # the driver may keep files of its own there
        return {name for name in os.listdir("/dev/shm") if not name.startswith("cuda.")}

    before = ours()
    end, process = acceptor()
    _, transport = borrow(end, 8 * MIB, 1)
    transport.evict(0, pieces(0, MIB)).wait()
    process.kill()
    process.wait()
    assert ours() <= before
