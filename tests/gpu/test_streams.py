"""Copies beside the computation, through the real store and pinned host memory.

The host link is slow, which is what these tests want: copies last long enough to be caught when
something does not wait for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.overlap import overlap_of
from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport.host.own import host_transport
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU
MIB = 2**20
WIDTH = 4096


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def store(device: torch.device) -> Iterator[ActivationStore]:
    made = ActivationStore(lambda size: host_transport("0-1", size, device, 60.0))
    yield made
    made.close()


def weights(device: torch.device) -> torch.nn.Parameter:
    torch.manual_seed(1)
    return torch.nn.Parameter(torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5)


def forward(weight: torch.nn.Parameter, seed: int, layers: int = 4) -> tuple:
    """Saves 64 MiB a tensor, several a layer."""
    dice = torch.Generator(weight.device).manual_seed(seed)
    x = torch.randn(WIDTH, WIDTH, device=weight.device, generator=dice).requires_grad_()
    h = x * 1.0
    for _ in range(layers):
        h = torch.nn.functional.gelu(h @ weight.t())
    return x, (h * h).mean()


def gradients(x: torch.Tensor, loss: torch.Tensor, weight: torch.nn.Parameter) -> list:
    weight.grad = None
    loss.backward()
    return [x.grad.clone(), weight.grad.clone()]


def test_bitwise_and_the_memory_is_free_at_once(store: ActivationStore, device: torch.device):
    weight = weights(device)
    expected = gradients(*forward(weight, 0), weight)
    torch.cuda.synchronize()
    x, loss = forward(weight, 0)
    full = torch.cuda.memory_allocated()
    store.measure(0, loss)
    store.capture(0, loss)
    moved = store.evict(0)
    assert torch.cuda.memory_allocated() >= full  # in flight: still here
    store.finish_evict(0)
    assert full - torch.cuda.memory_allocated() >= moved  # without a synchronise
    store.load(0)
    store.finish_load(0)
    actual = gradients(x, loss, weight)
    store.consume(0)
    store.check_empty()
    assert all(map(torch.equal, actual, expected))


def test_freed_memory_is_used_again_and_nothing_is_lost(
    store: ActivationStore, device: torch.device
):
    """What is freed is overwritten at once, out and back; a missing wait would show as garbage."""
    weight = weights(device)
    expected = {i: gradients(*forward(weight, i), weight) for i in range(3)}
    for _ in range(3):
        for i in range(3):
            x, loss = forward(weight, i)
            store.measure(i, loss)
            store.capture(i, loss)
            store.evict(i)
            store.finish_evict(i)
            garbage = [torch.full((16 * MIB,), float("nan"), device=device) for _ in range(8)]
            del garbage  # the load's targets lie where this was, while it may still be written
            store.load(i)
            store.finish_load(i)
            actual = gradients(x, loss, weight)
            store.consume(i)
            assert all(map(torch.equal, actual, expected[i]))
    store.check_empty()


def test_the_host_waits_for_nothing(store: ActivationStore, device: torch.device):
    weight = weights(device)
    for i in range(2):  # the first pins the pool
        x, loss = forward(weight, i, layers=8)
        store.measure(i, loss)
        store.capture(i, loss)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # about 0.1 s of the computing stream
        begun = time.perf_counter()
        store.evict(i)
        out = store.finish_evict(i)
        store.load(i)
        back = store.finish_load(i)
        host = time.perf_counter() - begun
        gradients(x, loss, weight)
        store.consume(i)
        copies = sum(end - start for start, end in (out.span, back.span))
    assert host < 0.25 * copies, (host, copies)


def test_an_eviction_runs_beside_the_computation(store: ActivationStore, device: torch.device):
    weight = weights(device)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for i in range(2):
        x, loss = forward(weight, i)
        store.measure(i, loss)
        store.capture(i, loss)
        store.evict(i)
        for _ in range(40):
            a @ a
        transfer = store.finish_evict(i)
        store.load(i)
        for _ in range(40):
            a @ a
        store.finish_load(i)
        gradients(x, loss, weight)
        store.consume(i)
    start, end = transfer.span
    assert end > start
    assert transfer.exposed < end - start  # some of it hid behind the products


def test_memory_does_not_creep(store: ActivationStore, device: torch.device):
    weight = weights(device)
    reserved = []
    for i in range(40):
        x, loss = forward(weight, i)
        store.measure(i, loss)
        store.capture(i, loss)
        store.evict(i)
        store.finish_evict(i)
        between = forward(weight, 1000 + i, layers=1 + i % 4)  # another amount each time
        store.load(i)
        store.finish_load(i)
        gradients(*between, weight)
        gradients(x, loss, weight)
        store.consume(i)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[20:]) <= max(reserved[:20])
    statistics = torch.cuda.memory_stats()
    assert statistics["num_alloc_retries"] == 0


def test_keep_local_copies_but_drops_nothing(store: ActivationStore, device: torch.device):
    store.keep_local = True
    weight = weights(device)
    expected = gradients(*forward(weight, 0), weight)
    x, loss = forward(weight, 0)
    store.measure(0, loss)
    store.capture(0, loss)
    for _ in range(2):
        store.evict(0)
        store.finish_evict(0)
        store.load(0)
        store.finish_load(0)
    assert all(map(torch.equal, gradients(x, loss, weight), expected))


def test_a_profile_shows_copies_beside_kernels(
    store: ActivationStore, device: torch.device, tmp_path: Path
):
    from torch.profiler import ProfilerActivity, profile

    weight = weights(device)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    x, loss = forward(weight, 0)
    store.measure(0, loss)
    store.capture(0, loss)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        store.evict(0)
        for _ in range(20):
            a @ a
        store.finish_evict(0)
        torch.cuda.synchronize()
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    found = overlap_of(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert found.copies > 0
    assert found.beside > 0.3 * min(found.copies, found.kernels)
    store.load(0)
    store.finish_load(0)
    gradients(x, loss, weight)
    store.consume(0)
