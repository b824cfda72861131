"""The warning about a link too slow to hide the copies, and the measurement of a transport."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron_bpipe.runtime.observe.link_watch import LinkWatch, too_slow, watch
from megatron_bpipe.runtime.transport.host import host_transport
from megatron_bpipe.runtime.transport.pair.bandwidth import SCRATCH, measure
from megatron_bpipe.schedule import Op

CPU = torch.device("cpu")
GIB = 2**30


@dataclass
class TransferHandle:
    span: tuple[float, float]
    exposed: float = 0.0

    def wait(self) -> None:
        pass


def iteration(copy: float, forward: float, observer: LinkWatch | None = None) -> LinkWatch:
    """What a watch sees of two micro-batches; seconds."""
    clock = iter(x for i in range(4) for x in (10.0 * i, 10.0 * i + forward))
    seen = observer or LinkWatch(lambda: next(clock), lambda a, b: b - a)
    for i in range(2):
        seen.forward_begins(Op.parse(f"F{i}"))
        seen.forward_done(Op.parse(f"F{i}"), None)
        for kind in "EL":
            seen.op_done(Op.parse(f"{kind}{i}"), 0.0, 1.0, GIB)
            seen.transfer_done(Op.parse(f"{kind}W{i}"), TransferHandle((3.0, 3.0 + copy)))
    return seen


def test_a_slow_link_is_named_with_both_numbers() -> None:
    said = iteration(copy=0.1, forward=0.05).verdict()
    assert said is not None
    assert "1024.0 MiB a micro-batch at 10.0 GiB/s take 100.0 ms, a forward 50.0 ms" in said
    assert "--bpipe-budget" in said


def test_a_fast_link_is_not() -> None:
    assert iteration(copy=0.05, forward=0.05).verdict() is None
    assert too_slow(GIB, 0.01, 0.05) is None


def test_an_iteration_without_transfers_shows_nothing() -> None:
    assert not watch().saw_transfers
    assert iteration(1.0, 1.0).saw_transfers


def test_the_watch_of_this_device_keeps_time() -> None:
    mine = watch()
    a = mine.mark()
    b = mine.mark()
    assert 0 <= mine.between(a, b) < 10


@pytest.mark.parametrize("microbatch_bytes", [0, 100_000])
def test_a_transport_is_measured_and_left_empty(microbatch_bytes: int) -> None:
    transport = host_transport("0-3", 2**20, CPU, 20)
    speed = measure(transport, microbatch_bytes, CPU)
    assert speed.size == max(1, microbatch_bytes)
    assert speed.out > 0
    assert speed.back > 0
    assert transport.occupied_bytes == 0
    with pytest.raises(KeyError):
        transport.release(SCRATCH)
    transport.close()
