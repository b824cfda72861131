"""The stand-in for a GPU sees what it is there for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_bpipe.runtime.transport.copies import Part
from megatron_bpipe.runtime.transport.cuda.driver import DriverError, allocate, copy_each, free
from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies
from tests.harness.stand_in_gpu import NEEDS_COMPILER, simulated_gpu, streams

pytestmark = NEEDS_COMPILER
CPU = torch.device("cpu")


@pytest.fixture
def gpu() -> Iterator[None]:
    with simulated_gpu():
        yield


@pytest.fixture
def copies(gpu: None) -> StreamCopies:
    return StreamCopies(CPU)


def seen() -> list[str]:
    """Violations; the test has expected them."""
    found = list(streams.violations)
    streams.violations.clear()
    return found


def start_early(copies: StreamCopies, target: torch.Tensor, source: torch.Tensor) -> None:
    """A copy that waits for nothing."""
    copies.copy([(target.data_ptr(), source.data_ptr(), source.numel())])
    copies.stream.synchronize()


def test_a_copy_of_what_is_still_computed_delivers_garbage(copies: StreamCopies) -> None:
    target = torch.zeros(64, dtype=torch.uint8)
    source = torch.ones(64, dtype=torch.uint8)
    ready = torch.cuda.current_stream().record_event()
    source.add_(1)  # after the event
    copies.stream.wait_event(ready)
    start_early(copies, target, source)
    assert bool((target == streams.GARBAGE).all())
    (violation,) = seen()
    assert "aten.add_.Tensor still makes what is copied" in violation


def test_a_copy_to_what_a_computation_still_reads_is_too_early(copies: StreamCopies) -> None:
    target, source = (torch.ones(64, dtype=torch.uint8) for _ in range(2))
    ready = torch.cuda.current_stream().record_event()
    target.sum()
    copies.stream.wait_event(ready)
    start_early(copies, target, source)
    (violation,) = seen()
    assert "aten.sum.default still uses where it is copied to" in violation


def test_a_copy_into_memory_that_was_another_tensor_s_must_wait_for_its_work(
    copies: StreamCopies,
) -> None:
    """A load's target may be memory that work queued before still uses."""
    source = torch.ones(2**20, dtype=torch.uint8)
    ready = torch.cuda.current_stream().record_event()
    copies.stream.wait_event(ready)
    before = torch.ones(2**20, dtype=torch.uint8)
    at = before.data_ptr()
    before.sum()
    del before
    copies.copy([(at, source.data_ptr(), 16)])
    assert len(seen()) == 1
    streams._pools.clear()  # the copy is not to be made: the memory is free


def test_a_copy_that_waits_is_right(copies: StreamCopies) -> None:
    target = torch.zeros(64, dtype=torch.uint8)
    source = torch.full((64,), 7, dtype=torch.uint8)
    source.add_(1)
    copies.start("x", [Part(target, 0, source, 0, 64)], out=True).wait()
    assert bool((target == 8).all())
    assert seen() == []


def test_what_the_host_has_waited_for_is_over(copies: StreamCopies) -> None:
    target = torch.zeros(64, dtype=torch.uint8)
    source = torch.full((64,), 7, dtype=torch.uint8)
    torch.cuda.current_stream().synchronize()
    start_early(copies, target, source)
    assert bool((target == 7).all())
    assert seen() == []


def test_work_of_other_streams_is_no_computation(copies: StreamCopies) -> None:
    target = torch.zeros(64, dtype=torch.uint8)
    source = torch.full((64,), 7, dtype=torch.uint8)
    start = copies.begin()
    other = torch.cuda.Stream()
    other.put(lambda: target.fill_(9))
    other.synchronize()
    copies.copy([(target.data_ptr(), source.data_ptr(), 64)])
    copies.end(start, []).wait()
    assert seen() == []


@pytest.mark.parametrize("end", ["target", "source"])
def test_a_copy_past_a_tensor_s_end_is_refused(copies: StreamCopies, end: str) -> None:
    short, long = torch.zeros(1000, dtype=torch.uint8), torch.zeros(1001, dtype=torch.uint8)
    target, source = (short, long) if end == "target" else (long, short)
    copies.begin()
    with pytest.raises(DriverError, match=r"cuMemcpyAsync: another error \(1\)"):
        copy_each([(target.data_ptr(), source.data_ptr(), 1001)], copies.stream.cuda_stream)


def test_a_copy_past_the_pool_s_end_is_refused(copies: StreamCopies) -> None:
    pool, source = allocate(4096), torch.zeros(4096, dtype=torch.uint8)
    copies.begin()
    copy_each([(pool, source.data_ptr(), 4096)], copies.stream.cuda_stream)
    with pytest.raises(DriverError, match=r"cuMemcpyAsync: another error \(1\)"):
        copy_each([(pool + 1, source.data_ptr(), 4096)], copies.stream.cuda_stream)
    copies.stream.synchronize()
    free(pool)
