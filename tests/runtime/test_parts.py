"""Activations that leave and return in parts, over the real shared-memory transport.

The graph is a row of equal layers, as a stage's is; its backward frees and needs the late ones
first.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_bpipe.runtime.activation import cut
from megatron_bpipe.runtime.block import IllegalMoveError
from megatron_bpipe.runtime.executor import ScheduleExecutor
from megatron_bpipe.runtime.graph import roots_of
from megatron_bpipe.runtime.steps import on_reaching
from megatron_bpipe.runtime.store import ActivationStore, measure
from megatron_bpipe.runtime.transport import PoolRequest
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.runtime.transport.shared_memory import (
    SharedMemoryAcceptor,
    shared_memory_transport,
)
from megatron_bpipe.schedule import ActivationKey, Op
from tests.runtime.test_store import live_bytes, watch

LAYERS, WIDTH, ROWS = 8, 16, 64
LAYER_BYTES = ROWS * WIDTH * 4
KEY = ActivationKey(0)


@pytest.fixture
def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(LAYERS)]


@pytest.fixture
def connect() -> Iterator[object]:
    acceptors: list[SharedMemoryAcceptor] = []

    def connect(size: int) -> OneSidedTransport:
        acceptors.append(SharedMemoryAcceptor("0-1", PoolRequest(size, 2)))
        rendezvous = PairRendezvous(dist.HashStore(), "0-1", "evictor", 10)
        return shared_memory_transport(rendezvous, acceptors[-1].offer)

    yield connect
    for acceptor in acceptors:
        acceptor.close()


def forward(weights: list[torch.nn.Parameter], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    hidden = start.clone()
    for weight in weights:
        hidden = torch.tanh(hidden @ weight)  # each saves its input and its output, once
    return start, hidden.sum()


def gradients(weights: list[torch.nn.Parameter], start: torch.Tensor) -> list[torch.Tensor]:
    return [start.grad.clone(), *(weight.grad.clone() for weight in weights)]


def expected(weights: list[torch.nn.Parameter], seed: int = 0) -> list[torch.Tensor]:
    start, output = forward(weights, seed)
    output.backward()
    found = gradients(weights, start)
    for weight in weights:
        weight.grad = None
    return found


def test_each_part_frees_its_share_and_comes_back_alone(weights, connect):
    wanted = expected(weights)
    store = ActivationStore(connect, parts=4)
    start, output = forward(weights)
    watched = watch(output)
    full = live_bytes(watched)
    store.measure(KEY, output)
    sizes = store.measured[0].sizes
    assert sum(sizes) == full == (LAYERS + 1) * LAYER_BYTES
    store.capture(KEY, output, {0, 1, 2})
    gone = 0
    for part in (0, 1, 2):
        moved = store.evict(KEY, part)
        store.finish_evict(KEY, part)
        gone += moved
        assert moved == sizes[part]
        assert live_bytes(watched) == full - gone
    assert gone >= 3 / 4 * full
    for part in (2, 1, 0):
        store.load(KEY, part)
        store.finish_load(KEY, part)
    output.backward()
    store.consume(KEY)
    store.check_empty()
    store.close()
    assert all(map(torch.equal, gradients(weights, start), wanted))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_the_first_parts_hold_their_shares_and_less_than_one_block_more(sizes, count):
    parts = cut(sizes, count)
    assert parts == sorted(parts)
    for k in range(1, count):
        held = sum(size for size, part in zip(sizes, parts, strict=True) if part < k)
        share = k * sum(sizes) / count
        assert share <= held < share + max(sizes)


@given(st.data())
def test_the_bound_in_bytes(data):
    """Of a few activations any first parts are away: units times a unit bounds what stays."""
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
    count, alive = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    parts, unit = cut(sizes, count), sum(sizes) / count
    here = units = pool = lent = 0
    for _ in range(alive):
        gone = data.draw(st.integers(0, count))
        away = sum(size for size, part in zip(sizes, parts, strict=True) if part < gone)
        here, units = here + sum(sizes) - away, units + count - gone
        pool, lent = pool + away, lent + gone
    assert here <= units * unit + 1e-6
    assert pool <= lent * unit + alive * max(sizes)


def test_a_backward_reaches_its_parts_in_order(weights):
    _, first = forward(weights)
    seen = measure(first, 4)
    _, output = forward(weights, seed=1)  # another graph, built in the same order
    watched, reached = watch(output), []
    at_start = live_bytes(watched)
    on_reaching(
        roots_of(output), seen.back, lambda part: reached.append((part, live_bytes(watched)))
    )
    output.backward()
    assert [part for part, _ in reached] == [2, 1, 0]
    for part, live in reached:  # what the later parts hold is freed by then, but for one block
        assert live <= at_start * (part + 1) / 4 + LAYER_BYTES


class OneStage:
    """A stage of `forward`, without neighbours."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        self.weights = weights
        self.live: dict[ActivationKey, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, op: Op) -> object:
        self.live[op.key] = forward(self.weights, op.microbatch)
        return self.live[op.key][1]

    def backward(self, op: Op) -> None:
        self.live.pop(op.key)[1].backward()


class Log:
    """Observer: what was over, in order, and how many bytes lived then."""

    def __init__(self) -> None:
        self.ops: list[str] = []

    def op_done(self, op: Op, start: float, end: float, moved: int) -> None:
        assert start <= end
        self.ops.append(str(op))

    def transfer_done(self, op: Op, transfer: object) -> None:
        transfer.wait()

    def forward_begins(self, op: Op) -> None: ...

    def forward_done(self, op: Op, output: object) -> None: ...


LINE = (
    "F0 E0/0 E0/1 E0/2 F1 EW0/0 EW0/1 EW0/2 E1/0 F2 EW1/0 L0/2 B0/3 LW0/2 L0/1 B0/2 LW0/1 "
    "E2/0 L0/0 B0/1 EW2/0 LW0/0 B0/0 L1/0 B1 LW1/0"
)


def test_the_list_is_run_in_its_order_from_within_the_backward(weights, connect):
    wanted = [expected(weights, i) for i in range(4)]
    line = LINE.replace("L1/0 B1 LW1/0", "L1/0 L2/0 F3 LW1/0 LW2/0 B1 B2 B3")
    ops = [Op.parse(word) for word in line.split()]
    stage, log = OneStage(weights), Log()
    store = ActivationStore(connect, parts=4)
    ScheduleExecutor(ops, stage, store, None, [log]).run()
    store.close()
    assert log.ops == line.split()
    for number, weight in enumerate(weights, start=1):
        assert torch.equal(weight.grad, sum(one[number] for one in wanted))


def test_a_part_that_is_needed_early_brings_itself_back(weights, connect, monkeypatch):
    """No hook tells where the backward is: each unpack runs the list up to its part."""
    monkeypatch.setattr("megatron_bpipe.runtime.executor.on_reaching", lambda *_: None)
    line = "F0 E0/0 E0/1 F1 EW0/0 EW0/1 B0/3 L0/1 B0/2 LW0/1 L0/0 B0/1 LW0/0 B0/0 B1"
    wanted = [expected(weights, i) for i in range(2)]
    stage, log = OneStage(weights), Log()
    store = ActivationStore(connect, parts=4)
    ScheduleExecutor([Op.parse(word) for word in line.split()], stage, store, None, [log]).run()
    store.close()
    assert log.ops == line.split()
    total = [a + b for a, b in zip(wanted[0][1:], wanted[1][1:], strict=True)]
    for weight, both in zip(weights, total, strict=True):
        assert torch.equal(weight.grad, both)


def test_a_part_that_nobody_brings_back_is_an_error(weights, connect):
    store = ActivationStore(connect, parts=4)
    _, output = forward(weights)
    store.measure(KEY, output)
    store.capture(KEY, output, {0})
    store.evict(KEY, 0)
    store.finish_evict(KEY, 0)
    with pytest.raises(IllegalMoveError, match="not in local memory"):
        output.backward()
    with pytest.raises(IllegalMoveError, match="0/0 is remote"):
        store.consume(KEY)
    store.close()


def test_a_failure_inside_a_backward_names_the_op(weights, connect):
    line = "F0 E0/0 F1 EW0/0 B0/3 B0/2 L0/0 B0/1 LW0/0 B0/0 B1"
    store = ActivationStore(connect, parts=4)

    def broken(key: ActivationKey, part: int = 0) -> int:
        raise RuntimeError("the pool is gone")

    store.load = broken  # type: ignore[method-assign]
    executor = ScheduleExecutor([Op.parse(w) for w in line.split()], OneStage(weights), store)
    with pytest.raises(RuntimeError, match="the pool is gone") as caught:
        executor.run()
    assert sum(">>>L0/0<<<" in note for note in caught.value.__notes__) == 1
    store.close()
