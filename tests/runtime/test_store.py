"""The activation store over the real shared-memory transport, evictor and acceptor in one process.

The graph holds what a transformer's does: a custom Function, saved outputs, views of one storage,
a tensor shared with others, a Parameter, and the stage's input.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bpipe.runtime.activation import Activation
from megatron_bpipe.runtime.block import IllegalMoveError, ModifiedInPlaceError
from megatron_bpipe.runtime.graph import Kept, nodes_below, roots_of, saved_storages
from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport import PoolRequest
from megatron_bpipe.runtime.transport.base import NothingToMove
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.runtime.transport.shared_memory import (
    SharedMemoryAcceptor,
    shared_memory_transport,
)


class Linear(torch.autograd.Function):
    """Saves through a context, as Megatron's linear layers do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        assert isinstance(weight, torch.nn.Parameter)  # fused kernels look for its main_grad
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


MASK = torch.ones(8, 8).tril()


def model(x: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
    h = Linear.apply(x * 2, weight)
    q, k, v = h.chunk(3, -1)  # views of one storage, rebuilt as such
    scores = torch.softmax(q @ k.transpose(-1, -2) * MASK, -1)
    h = torch.cat([scores @ v, torch.nn.functional.gelu(v)], -1)
    return (h * h.exp()).sum((0, 2)).unsqueeze(0).expand(3, -1) ** 2


@pytest.fixture
def weight() -> torch.nn.Parameter:
    torch.manual_seed(1)
    return torch.nn.Parameter(torch.randn(12, 4))


@pytest.fixture
def ends() -> Iterator[tuple[ActivationStore, list[SharedMemoryAcceptor]]]:
    acceptor_ends = []

    def connect(size: int) -> OneSidedTransport:
        acceptor_ends.append(SharedMemoryAcceptor("0-1", PoolRequest(size, 1)))
        rendezvous = PairRendezvous(dist.HashStore(), "0-1", "evictor", 10)
        return shared_memory_transport(rendezvous, acceptor_ends[-1].offer)

    store = ActivationStore(connect)
    yield store, acceptor_ends
    store.close()
    for acceptor_end in acceptor_ends:
        acceptor_end.close()


def micro_batch(weight: torch.nn.Parameter, seed: int = 0, rows: int = 2) -> tuple:
    x = torch.randn(rows, 8, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return x, model(x, weight)


def gradients(x: torch.Tensor, output: torch.Tensor, weight: torch.nn.Parameter) -> tuple:
    weight.grad = None
    output.sum().backward()
    return x.grad.clone(), weight.grad.clone()


def live_bytes(watched: list[tuple[StorageWeakRef, int]]) -> int:
    return sum(size for reference, size in watched if not reference.expired())


def watch(output: torch.Tensor) -> list[tuple[StorageWeakRef, int]]:
    entries = saved_storages(roots_of(output))
    of_this = (e for e in entries if e.kept not in (Kept.PARAMETER, Kept.INPUT))
    return [(StorageWeakRef(e.storage), e.storage.nbytes()) for e in of_this]


def away(store: ActivationStore, weight: torch.nn.Parameter) -> torch.Tensor:
    """The output of a micro-batch 0 that has left."""
    _, output = micro_batch(weight)
    store.measure(0, output)
    store.capture(0, output)
    store.evict(0)
    store.finish_evict(0)
    return output


def there_and_back(store: ActivationStore, i: int) -> None:
    store.evict(i)
    store.finish_evict(i)
    store.load(i)
    store.finish_load(i)


def test_gradients_are_bitwise_equal_and_the_memory_is_really_gone(weight, ends):
    store, acceptor_ends = ends
    expected = gradients(*micro_batch(weight), weight)
    x, output = micro_batch(weight)
    watched = watch(output)
    full = live_bytes(watched)
    store.measure(0, output)
    store.capture(0, output)
    moved = store.evict(0)
    assert live_bytes(watched) == full  # in flight: still here
    store.finish_evict(0)
    # what stays: the mask, shared by all micro-batches
    assert live_bytes(watched) == MASK.untyped_storage().nbytes()
    assert moved >= 0.9 * (full - live_bytes(watched))
    assert acceptor_ends[0].pool_bytes >= moved
    store.load(0)
    store.finish_load(0)
    actual = gradients(x, output, weight)
    store.consume(0)
    store.check_empty()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert store.totals.evicted == store.totals.loaded == moved


def test_why_each_storage_stays_or_leaves(weight):
    _, output = micro_batch(weight)
    entries = saved_storages(roots_of(output), [weight.untyped_storage()._cdata])
    why = {}
    for entry in entries:
        why.setdefault(entry.kept, []).append(entry.storage._cdata)
    assert why[Kept.PARAMETER] == [weight.untyped_storage()._cdata]
    assert why[Kept.SHARED] == [MASK.untyped_storage()._cdata]
    assert Kept.SPECIAL not in why
    assert len(why[None]) >= 5


def test_one_flipped_byte_changes_the_gradients(weight, ends):
    store, _ = ends
    expected = gradients(*micro_batch(weight), weight)

    x, output = micro_batch(weight)
    store.measure(0, output)
    store.capture(0, output)
    store.evict(0)
    store.finish_evict(0)
    load = store.transport.load

    def load_and_flip(key, pieces):
        transfer = load(key, pieces)
        transfer.wait()
        piece = max(pieces, key=torch.Tensor.numel)
        piece[piece.numel() // 2 + 2] ^= 0x40
        return transfer

    store.transport.load = load_and_flip
    store.load(0)
    store.finish_load(0)
    actual = gradients(x, output, weight)
    assert not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_keep_local_copies_but_drops_nothing(weight, ends):
    store, _ = ends
    store.keep_local = True
    expected = gradients(*micro_batch(weight), weight)
    x, output = micro_batch(weight)
    watched = watch(output)
    full = live_bytes(watched)
    store.measure(0, output)
    store.capture(0, output)
    store.evict(0)
    store.finish_evict(0)
    assert live_bytes(watched) == full
    store.load(0)
    store.finish_load(0)
    actual = gradients(x, output, weight)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_several_micro_batches_of_unequal_size_share_the_pool(weight, ends):
    store, acceptor_ends = ends
    sizes = {0: 2, 1: 5, 2: 3}
    expected = {i: gradients(*micro_batch(weight, i, n), weight) for i, n in sizes.items()}
    live = {}
    for i, rows in sizes.items():
        live[i] = micro_batch(weight, i, rows)
        store.measure(i, live[i][1])
        store.capture(i, live[i][1])
        store.evict(i)
        store.finish_evict(i)
    lent = acceptor_ends[0].pool_bytes
    for i in sizes:
        store.load(i)
        store.finish_load(i)
        actual = gradients(*live.pop(i), weight)
        store.consume(i)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected[i], strict=True))
    store.check_empty()
    assert acceptor_ends[0].pool_bytes == lent  # lengthened by the evictor, seen by the acceptor


def test_a_micro_batch_can_leave_twice(weight, ends):
    store, _ = ends
    expected = gradients(*micro_batch(weight), weight)
    x, output = micro_batch(weight)
    store.measure(0, output)
    store.capture(0, output)
    there_and_back(store, 0)
    there_and_back(store, 0)
    actual = gradients(x, output, weight)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_illegal_moves_are_named(weight, ends):
    store, _ = ends
    _, output = micro_batch(weight)
    store.measure(3, output)
    store.capture(3, output)
    with pytest.raises(IllegalMoveError, match="micro-batch 3 is resident and can only become"):
        store.load(3)
    store.evict(3)
    store.finish_evict(3)
    with pytest.raises(IllegalMoveError, match="micro-batch 3 is remote and can only become"):
        store.consume(3)


def test_a_backward_before_the_load_is_refused(weight, ends):
    store, _ = ends
    output = away(store, weight)
    with pytest.raises(IllegalMoveError, match="not in local memory"):
        output.sum().backward()


def test_what_is_forgotten_is_not_left_over(weight, ends):
    """As it is after an iteration whose forwards ahead are thrown away."""
    store, _ = ends
    _graph = away(store, weight)  # which lives as long as its output
    store.forget()
    store.check_empty()
    assert store.totals.forgotten == store.totals.evicted > 0


def test_something_left_over_is_reported(weight, ends):
    store, _ = ends
    _graph = away(store, weight)  # which lives as long as its output
    with pytest.raises(RuntimeError, match="0: 'remote'"):
        store.check_empty()


@pytest.mark.parametrize("still_held", [True, False])
def test_a_change_in_place_before_the_evict_is_caught_where_it_is_read(ends, still_held):
    store, _ = ends
    x = torch.randn(4, 4, requires_grad=True)
    h = x * 2
    output = h.exp().sum() + (h * h).sum()
    store.measure(0, output)
    store.capture(0, output)
    with torch.no_grad():
        h.add_(1)
    if not still_held:
        del h  # it would leave
    there_and_back(store, 0)
    with pytest.raises(ModifiedInPlaceError, match="changed in place"):
        output.backward()


def test_a_change_in_place_after_the_evict_is_caught(ends):
    store, _ = ends
    x = torch.randn(4, 4, requires_grad=True)
    h = x * 2  # still held here: stays local, so it can be written to
    output = (h * h).sum()
    store.measure(0, output)
    store.capture(0, output)
    there_and_back(store, 0)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(ModifiedInPlaceError, match="changed in place"):
        output.backward()


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, positional=(), named=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*positional, **named or {})


class Books:
    """A transport that copies nothing, so that the store's own calls are counted."""

    occupied_bytes = 0

    def evict(self, key, pieces):
        self.sizes = [piece.numel() for piece in pieces]
        return NothingToMove()

    def load(self, key, pieces):
        assert [piece.numel() for piece in pieces] == self.sizes
        return NothingToMove()

    def release(self, key):
        pass


def test_calls_at_e_and_l_do_not_grow_with_the_number_of_storages():
    """They run while a GPU has nothing else to do: its host has just waited for a message."""
    small, large = 300, 3
    store = ActivationStore(lambda size: Books())
    h = torch.ones(100, requires_grad=True) + 0
    for _ in range(small):
        h = h.exp()
    for _ in range(large):
        h = h.repeat(3_000).sin().narrow(0, 0, 100)  # 1.2 MB each
    output = h + 0
    del h
    store.measure(0, output)
    store.capture(0, output)
    with Calls() as calls:
        moved = store.evict(0)
        store.finish_evict(0)
    assert moved == small * 400 + large * 1_200_000
    assert calls.count == {}  # all was ready when the forward had been launched
    with Calls() as calls:
        store.load(0)
        store.finish_load(0)
    # one allocation and one cut for each large storage, and for the small ones together: with
    # room for alignment they take 153,600 bytes, less than a sixteenth of the whole
    assert calls.count == {"empty": large + 1, "split_with_sizes": large + 1}
    store.consume(0)


def test_nothing_stays_open(weight, ends):
    before = len(os.listdir("/proc/self/fd"))
    store, acceptor_ends = ends
    _, output = micro_batch(weight)
    store.measure(0, output)
    store.capture(0, output)
    store.evict(0)
    store.finish_evict(0)
    store.close()
    acceptor_ends.pop().close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_saved_on_another_device_stays(weight):
    """Older SDPA saves its random generator's state on the host."""
    _, output = micro_batch(weight)
    elsewhere = Activation(0, roots_of(output), torch.device("meta"))
    elsewhere.capture()
    assert elsewhere.leaving == []
    _, output = micro_batch(weight)
    here = Activation(0, roots_of(output), torch.device("cpu"))
    here.capture()
    assert len(here.leaving) > 5


def test_the_backward_lets_go_of_each_tensor_as_it_passes(ends):
    """As stock autograd does; a micro-batch that left and came back must not stay whole."""
    store, _ = ends
    h = torch.ones(64, 64, requires_grad=True)
    for _ in range(8):
        h = h.exp()
    store.measure(0, h)
    store.capture(0, h)
    watched = []

    def watch_loaded(key, storages):
        watched.extend((StorageWeakRef(one), one.nbytes()) for one in storages)

    store.on_load = watch_loaded
    there_and_back(store, 0)
    counts = []
    for node in nodes_below(roots_of(h)):
        node.register_hook(lambda *_: counts.append(live_bytes(watched)))
    h.sum().backward()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 7 * h.untyped_storage().nbytes()  # the eighth is the output, held here
    assert counts[-1] <= h.untyped_storage().nbytes()
    store.consume(0)
