"""What is not understood stays where it is, is counted as kept, and training goes on as stock's.

Each case runs a graph with one kind of saved tensor beside ordinary ones through the real store and
the shared-memory transport, and compares the gradients with those of a run without.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_bpipe.runtime import torch_internals
from megatron_bpipe.runtime.graph import Kept, roots_of, saved_graph
from megatron_bpipe.runtime.observe.audit import audit_forward
from megatron_bpipe.runtime.observe.memory import LiveActivations
from megatron_bpipe.schedule.ops import ActivationKey
from tests.runtime.test_store import ends, there_and_back  # noqa: F401  # a fixture

Case = Callable[[torch.Tensor], torch.Tensor]
SAVED = 16 * 16 * 4  # bytes of one ordinary tensor below


class Saving(torch.autograd.Function):
    """Saves what it is given, reads it back, and passes the gradient on, scaled by its sum."""

    @staticmethod
    def forward(ctx, x, *saved):
        ctx.save_for_backward(x, *saved)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        x, *saved = ctx.saved_tensors
        for one in saved:
            gradient = gradient * _sum(one)
        return gradient * x, *(None for _ in ctx.needs_input_grad[1:])


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.values() if tensor.layout is torch.jagged else tensor).sum().float()


def saving(make: Callable[[], torch.Tensor]) -> Case:
    return lambda x: Saving.apply(x + 0, make())


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


class Wrapper(torch.Tensor):
    """As Transformer Engine's quantised tensors: a size, and no memory behind it."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, positional=(), named=None):
        if function is torch.ops.aten.detach.default:
            return cls(positional[0].inner)
        return function(*(a.inner if isinstance(a, cls) else a for a in positional), **named or {})


def checkpointed(x: torch.Tensor) -> torch.Tensor:
    ran.append(0)
    return (x + 0).sin()


ran: list[int] = []
PLAIN: dict[str, Case] = {
    "nothing": lambda x: x + 0,
    "zero size": saving(lambda: torch.zeros(0, 4)),
    "emptied": saving(lambda: _emptied()),
    "no grad": lambda x: (x + 0).detach().exp().requires_grad_() + x,
    "sparse COO": saving(lambda: torch.eye(4).to_sparse()),
    "sparse CSR": saving(lambda: torch.eye(4).to_sparse_csr()),
    "jagged": saving(jagged),
    "wrapper subclass": saving(lambda: Wrapper(torch.ones(4))),
    "conjugated": saving(lambda: torch.ones(4, dtype=torch.complex64).conj()),
    "a checkpoint": lambda x: checkpoint(checkpointed, x + 0, use_reentrant=False),
}


def _emptied() -> torch.Tensor:
    tensor = torch.zeros(0)
    tensor.untyped_storage().resize_(0)
    return tensor


def run(case: Case, store) -> tuple[torch.Tensor, int]:
    x = torch.arange(256.0).view(16, 16).div(256).requires_grad_()
    output = case(x)
    moved = 0
    if store is not None:
        store.measure(0, output)
        store.capture(0, output)
        moved = store.evict(0)
        store.finish_evict(0)
        assert store.load(0) == moved
        store.finish_load(0)
    if output.grad_fn is not None:
        output.sum().backward()
    if store is not None:
        store.consume(0)
        store.check_empty()
    return x.grad, moved


@pytest.mark.filterwarnings("ignore:.*(sparse CSR|Sparse CSR|nested tensors)")
@pytest.mark.parametrize("name", PLAIN)
def test_alone_and_beside_ordinary_tensors(name, ends):  # noqa: F811
    store, _ = ends
    case = PLAIN[name]
    expected, _ = run(case, None)
    ran.clear()
    actual, moved = run(case, store)
    assert torch.equal(actual, expected)
    assert moved in (0, SAVED, 2 * SAVED)  # what of it is ordinary
    assert len(ran) in (0, 2)  # a checkpoint's function: forward and backward, never to be read

    def beside(x: torch.Tensor) -> torch.Tensor:
        return case(x).exp().sin() if name != "no grad" else (x + 0).exp() + case(x)

    expected, _ = run(beside, None)
    actual, moved = run(beside, store)
    assert torch.equal(actual, expected)
    assert moved >= SAVED


def test_a_stage_without_gradients_moves_nothing(ends):  # noqa: F811
    """A frozen first stage, or all of a forward under ``no_grad``."""
    store, _ = ends
    assert run(lambda x: x.detach().exp(), store) == (None, 0)


def hooked(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        x = (x + 0).exp()
    x = checkpoint(checkpointed, x, use_reentrant=False)
    return (x + 0).exp().sin()


def test_hooks_of_others_are_counted_and_never_run_by_looking():
    ran.clear()
    x = torch.ones(16, 16, requires_grad=True)
    output = hooked(x)
    audit = audit_forward(0, output, None, (), ())
    assert audit.unread_slots == 2  # exp's, and sin's in the checkpoint
    assert ran == [0]
    output.sum().backward()
    assert ran == [0, 0]


def test_hooks_are_recognised_where_slots_do_not_show_them(monkeypatch, ends):  # noqa: F811
    """As before torch 2.10."""
    store, _ = ends
    monkeypatch.setattr(torch_internals, "SHOWS_HOOKS", False)
    owner, name = torch_internals.HOOKS_ARE_SET_BY
    stock = getattr(owner, name)
    assert torch_internals.probe() == []
    assert getattr(owner, name) is stock
    expected, _ = run(hooked, None)
    monkeypatch.setattr(owner, name, torch_internals.let_hooks_be_seen(stock))
    ran.clear()
    actual, moved = run(hooked, store)
    assert torch.equal(actual, expected)
    assert moved == SAVED  # the last exp's, which the last sin saved too
    assert ran == [0, 0]


def test_the_audit_has_the_bytes_of_what_is_not_plain():
    x = torch.ones(16, 16, requires_grad=True)
    sparse = torch.eye(64).to_sparse()
    output = Saving.apply(x + 0, sparse, Wrapper(torch.ones(1000)))
    audit = audit_forward(0, output, None, (), ())
    assert audit.kept_bytes["not plain bytes"] == 64 * (2 * 8 + 4)  # indices, values
    assert audit.evictable_bytes == SAVED


class Unread(torch.autograd.Function):
    """Saves its input and never reads it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize("when", ["in the forward", "before the evict", "after the load"])
def test_changed_in_place_and_never_read_trains_as_stock(when, ends):  # noqa: F811
    """Autograd complains where a saved tensor is read, not where it is changed."""
    store, _ = ends
    x = torch.ones(16, 16, requires_grad=True)
    h = x + 0
    output = Unread.apply(h).sin()

    def change(now: str) -> None:
        if now == when:
            with torch.no_grad():
                h.add_(1)

    change("in the forward")
    store.measure(0, output)
    store.capture(0, output)
    change("before the evict")
    there_and_back(store, 0)
    change("after the load")
    output.sum().backward()
    assert torch.equal(x.grad, 2 * torch.full((16, 16), 2.0).cos())
    assert store.totals.evicted == SAVED  # sin's input


def test_attributes_of_a_saved_tensor_come_back(ends):  # noqa: F811
    store, _ = ends
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            seen.append(vars(ctx.saved_tensors[0]))
            return gradient

    def case(x: torch.Tensor) -> torch.Tensor:
        h = x + 0
        h.scale, h.tag = 0.5, "mine"
        return Look.apply(h)

    run(case, None)
    _, moved = run(case, store)
    assert moved == SAVED
    assert seen == [{"scale": 0.5, "tag": "mine"}] * 2


def test_a_function_class_made_in_a_forward_does_not_live_for_ever(ends):  # noqa: F811
    store, _ = ends
    closures = []

    def case(x: torch.Tensor) -> torch.Tensor:
        factor = torch.full((16, 16), 2.0)
        closures.append(weakref.ref(factor))

        class Made(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * factor

            @staticmethod
            def backward(ctx, gradient):
                return gradient * factor

        return Made.apply(x + 0)

    run(case, None)
    gc.collect()
    assert closures[-1]() is None
    run(case, store)
    gc.collect()
    assert closures[-1]() is None


class WithoutOutput(torch.autograd.Function):
    """Saves a leaf of its own and reads its gradient from it, as Megatron's checkpoint does."""

    @staticmethod
    def forward(ctx, x):
        with torch.no_grad():
            output = x.exp()
        ctx.save_for_backward(x.detach().requires_grad_())
        return output

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x.exp().backward(gradient)
        (again,) = ctx.saved_tensors
        return again.grad


def test_a_checkpoint_s_own_leaf_leaves_and_comes_back_as_itself(ends):  # noqa: F811
    store, _ = ends

    def case(x: torch.Tensor) -> torch.Tensor:
        return WithoutOutput.apply(x + 0).sin()  # sin saves the output

    entries = saved_graph(roots_of(case(torch.ones(16, 16, requires_grad=True)))).storages
    assert [entry.kept for entry in entries] == [None, None]
    expected, _ = run(case, None)
    actual, moved = run(case, store)
    assert torch.equal(actual, expected)
    assert moved == 2 * SAVED

    live = LiveActivations()
    x = torch.ones(16, 16, requires_grad=True)
    output = case(x)
    key = ActivationKey(0)
    live.track_graph(key, output, ())
    assert live.sample() == (2 * SAVED, 1)
    store.capture(key, output)
    store.evict(key)
    store.finish_evict(key)
    assert live.sample() == (0, 0)
    store.load(key)
    store.finish_load(key)
    output.sum().backward()
    store.consume(key)


def test_a_leaf_that_somebody_holds_stays(ends):  # noqa: F811
    store, _ = ends
    held = []

    class Holding(WithoutOutput):
        @staticmethod
        def forward(ctx, x):
            leaf = x.detach().requires_grad_()
            held.append(leaf)
            ctx.save_for_backward(leaf)
            return x.exp()

    _, moved = run(lambda x: Holding.apply(x + 0), store)
    assert moved == 0
    assert held[0].untyped_storage().nbytes() == SAVED
    entries = saved_graph(roots_of(Holding.apply(torch.ones(16, 16, requires_grad=True) + 0)))
    assert [entry.kept for entry in entries.storages] == [Kept.INPUT]


def test_what_outlives_an_iteration_is_no_activation():
    """A cache of quantised weights is saved by every micro-batch and stays."""
    cache = torch.ones(1000)
    live = LiveActivations()
    seen = []
    for _ in range(3):
        live.clear()
        output = Saving.apply(torch.ones(16, 16, requires_grad=True) + 0, cache)
        live.track_graph(ActivationKey(0), output, ())
        seen.append(live.sample()[0])
        output.sum().backward()
        del output
        seen.append(live.sample()[1])
    assert seen == [4000 + SAVED, 1, SAVED, 0, SAVED, 0]


class Embedding(torch.autograd.Function):
    """Saves token ids and a table of its own."""

    @staticmethod
    def forward(ctx, x, ids):
        ctx.save_for_backward(x.exp(), ids)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


def test_data_that_an_iterator_holds_counts_in_bytes_only():
    """Token ids outlive their micro-batch's backward, as its outputs must not."""
    live, key = LiveActivations(), ActivationKey(0)
    ids = torch.zeros(SAVED, dtype=torch.int64)
    output = Embedding.apply(torch.ones(16, 16, requires_grad=True) + 0, ids)
    live.track_graph(key, output, ())
    assert live.bytes_of(key) == 9 * SAVED
    assert live.sample(4) == (9 * SAVED, 4)
    assert live.left_behind() == 0
    output.sum().backward()
    del output
    live.backward_over(key)
    assert live.sample(4) == (8 * SAVED, 0)
    assert live.left_behind() == 8 * SAVED
    live.clear()
    assert live.left_behind() == 0
