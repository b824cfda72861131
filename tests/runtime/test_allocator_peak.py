"""The allocator's peak: read once an iteration where it is kept, sampled elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_bpipe.runtime.observe.memory import allocated_bytes, peak_watch
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.schedule.ops import Op

FORWARD, BACKWARD = Op.parse("F0"), Op.parse("B0")


class Allocator:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = self.in_use = self.most = 0

    def allocated(self) -> int:
        self.asked += 1
        return self.in_use

    def watch(self) -> Callable[[], int]:
        self.most = self.in_use

        def peak() -> int:
            self.asked += 1
            return self.most

        return peak

    def use(self, more: int) -> None:
        self.in_use += more
        self.most = max(self.most, self.in_use)


def iteration(recorder: Recorder, allocator: Allocator, layers: int) -> None:
    recorder.begin(())
    x = torch.randn(4, requires_grad=True)
    recorder.forward_begins(FORWARD)
    output = x * 1.0
    for _ in range(layers):
        output = output.tanh()
    recorder.forward_done(FORWARD, output)
    recorder.op_done(FORWARD, 0.0, 1.0, 0)
    allocator.use(70)  # a workspace of the backward, gone when it is over
    allocator.use(-70)
    output.sum().backward()
    recorder.op_done(BACKWARD, 1.0, 2.0, 0)
    recorder.end([])


def test_a_peak_between_ops_is_seen_and_the_allocator_seldom_asked() -> None:
    asked = []
    for layers in (3, 300):
        allocator = Allocator()
        recorder = Recorder(0, 0, allocator.allocated, allocator.watch)
        iteration(recorder, allocator, layers)
        allocator.asked = 0
        iteration(recorder, allocator, layers)
        assert recorder.peaks.allocator_bytes == 70
        asked.append(allocator.asked)
    assert asked[0] == asked[1] <= 5


def test_without_a_peak_every_node_is_looked_at() -> None:
    allocator = Allocator()
    iteration(Recorder(0, 0, allocator.allocated), allocator, 300)
    assert allocator.asked > 300


def test_a_cpu_keeps_no_peak() -> None:
    assert peak_watch(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_one() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    watch = peak_watch(device)
    assert watch is not None
    peak = watch()
    before = allocated_bytes(device)
    assert before is not None
    torch.empty(2**20, device=device)
    assert peak() >= before + 2**22
