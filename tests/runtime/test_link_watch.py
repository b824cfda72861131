"""The warning about a link too slow to hide the copies, and the measurement of a transport."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron_bpipe.runtime.observe import link_watch
from megatron_bpipe.runtime.observe.link_watch import EVERY, LinkSampler, LinkWatch, too_slow, watch
from megatron_bpipe.runtime.transport.host.own import host_transport
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


def iteration(
    *,
    evict: float = 0.01,
    load: float = 0.01,
    evict_waits: float = 0.0,
    load_waits: float = 0.0,
    fastest: float | None = None,
    observer: LinkWatch | None = None,
) -> LinkWatch:
    """What a watch sees of an iteration of 2 s with two micro-batches and forwards of 50 ms.

    ``evict`` and ``load`` are the seconds of a copy, ``fastest`` of the first one alone, and
    ``..._waits`` what the computation stood still for both copies of that direction.
    """
    clock = iter((0.0, 0.05, 1.0, 1.05, 2.0))
    seen = observer or LinkWatch(lambda: next(clock), lambda a, b: b - a)
    for i in range(2):
        seen.forward_begins(Op.parse(f"F{i}"))
        seen.forward_done(Op.parse(f"F{i}"), None)
        for kind, copy, waits in (("E", evict, evict_waits), ("L", load, load_waits)):
            seconds = fastest if i == 0 and fastest is not None else copy
            seen.op_done(Op.parse(f"{kind}{i}"), float(i), i + 1.0, GIB)
            handle = TransferHandle((3.0, 3.0 + seconds), waits / 2)
            seen.transfer_done(Op.parse(f"{kind}W{i}"), handle)
    return seen


def test_a_slow_link_is_named_with_what_it_cost() -> None:
    said = iteration(evict=0.1, load=0.1, evict_waits=0.3).verdict()
    assert said is not None
    assert said.startswith("evictions were waited for 300.0 of 2000.0 ms of an iteration; ")
    assert "1024.0 MiB a micro-batch at 10.0 GiB/s take 100.0 ms, a forward 50.0 ms" in said
    assert "--bpipe-budget" in said
    slower = iteration(evict=20.0, evict_waits=1.0).verdict()
    assert slower is not None
    assert "1024.0 MiB a micro-batch at 51.2 MiB/s take 20000.0 ms" in slower


def test_each_direction_is_judged_by_itself() -> None:
    said = iteration(load=0.1, load_waits=0.3).verdict()
    assert said is not None
    assert said.startswith("loads were waited for 300.0 of 2000.0 ms")


def test_one_fast_copy_excuses_nothing() -> None:
    """As over 40 Mbit/s, where 1.5 of 2.1 s were exposed."""
    assert iteration(evict=0.7, evict_waits=1.5, fastest=0.001).verdict() is not None


def test_what_hides_is_no_fault() -> None:
    assert iteration(evict=0.1, load=0.05, evict_waits=0.09, load_waits=0.09).verdict() is None
    assert too_slow(GIB, 0.01, 0.05) is None


def test_a_short_copy_that_is_waited_for_is_no_fault_of_the_link() -> None:
    said = iteration(evict=0.01, evict_waits=0.3).verdict()
    assert said is not None
    assert "slower than the others" in said
    assert "--bpipe-budget" not in said


@pytest.mark.parametrize(
    ("waits", "said"),
    [
        (0.02, "waited for 20.0 of 2000.0 ms of an iteration; to recompute all layers of stage 1 "),
        (0.02, "instead would take 100.0 ms: moving is cheaper"),  # two forwards of 50 ms
        (0.3, "recomputing is cheaper, --bpipe-recompute 0,N,0 with N its layers"),
    ],
)
def test_moving_or_recomputing(waits: float, said: str) -> None:
    text = iteration(evict=0.1, load=0.3, evict_waits=waits).moving_or_recomputing(1, 3)
    assert text.startswith("4096.0 MiB out and back at 5.0 GiB/s are")  # 4 copies, 0.8 s
    assert said in text


def test_an_iteration_without_transfers_shows_nothing() -> None:
    assert not watch().saw_transfers
    assert iteration().saw_transfers


class Iterations:
    """A sampler and, in each iteration, copies that are waited for as long as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(10**6))
        made = lambda: LinkWatch(lambda: next(clock), lambda a, b: 0.05 if b == a + 1 else 2.0)  # noqa: E731
        monkeypatch.setattr(link_watch, "watch", made)
        self.sampler, self.number, self.looked = LinkSampler(), 0, []

    def run(self, count: int, waits: float) -> list[int]:
        """Run iterations; the numbers, from 1, of those after which there was news."""
        news = []
        for _ in range(count):
            self.number += 1
            if self.sampler.watch is not None:
                self.looked.append(self.number)
                iteration(evict=0.1, evict_waits=waits, observer=self.sampler.watch)
            if self.sampler.iteration_over() is not None:
                news.append(self.number)
        return news


def test_few_iterations_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    iterations = Iterations(monkeypatch)
    assert iterations.run(1000, waits=0.0) == []
    assert iterations.looked == [2 + EVERY * i for i in range(10)]


def test_each_slow_spell_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    iterations = Iterations(monkeypatch)
    assert iterations.run(500, waits=0.5) == [3]  # slow from the start: seen twice, told once
    assert iterations.run(500, waits=0.06) == []  # better, not well
    assert iterations.run(200, waits=0.01) == []  # the spell is over
    (again,) = iterations.run(500, waits=0.5)
    assert 1200 < again <= 1200 + EVERY + 1


def test_one_hiccup_is_not_a_spell(monkeypatch: pytest.MonkeyPatch) -> None:
    iterations = Iterations(monkeypatch)
    assert iterations.run(2, waits=0.5) == []
    assert iterations.run(100, waits=0.0) == []


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
    assert SCRATCH not in transport._pool.taken
    transport.close()
