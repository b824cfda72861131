"""Layers that keep activations as Transformer Engine does, out and back on the stand-in GPU.

Not Transformer Engine itself, which needs a GPU (tests/gpu/test_layers_saved.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport.cuda.streams import StreamCopies
from megatron_bpipe.runtime.transport.host.own import HostMemory, host_transport
from megatron_bpipe.runtime.transport.one_sided import OneSidedTransport
from megatron_bpipe.schedule.ops import ActivationKey
from tests.harness.like_transformer_engine import Mlp
from tests.harness.stand_in_gpu import NEEDS_COMPILER, simulated_gpu

pytestmark = NEEDS_COMPILER
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOKENS, HIDDEN, LAYERS = 96, 64, 3
# the quantised input of the second product and the input of the activation function, of each layer
LEAST = LAYERS * (TOKENS * 4 * HIDDEN + TOKENS * 4 * HIDDEN * 4)


@pytest.fixture
def store() -> Iterator[ActivationStore]:
    with simulated_gpu():
        made = ActivationStore(
            lambda size: OneSidedTransport("0-1", HostMemory("0-1", size, GPU), StreamCopies(CPU))
        )
        yield made
        made.close()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Mlp(HIDDEN) for _ in range(LAYERS)))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def gradients(layers: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    assert x.grad is not None
    found = [x.grad.clone(), *(p.grad.clone() for p in layers.parameters())]
    layers.zero_grad()
    return found


def in_flight_together(
    layers: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], store: ActivationStore
) -> list[list[torch.Tensor]]:
    """Three micro-batches' gradients; all are forward before the first is backward."""
    keys = [ActivationKey(i) for i in range(3)]
    inputs = [batch(i).requires_grad_() for i in range(3)]
    outputs = []
    for key, x in zip(keys, inputs, strict=True):
        outputs.append(forward(x))
        store.measure(key, outputs[-1])
        store.capture(key, outputs[-1])
        moved = store.evict(key)
        store.finish_evict(key)
        assert moved >= LEAST
        garbage = [torch.full((n,), float("nan")) for n in (6144, 24576) * 8]
        del garbage
    found = []
    for key, x, output in zip(keys, inputs, outputs, strict=True):
        store.load(key)
        store.finish_load(key)
        output.sum().backward()
        store.consume(key)
        found.append(gradients(layers, x))
    store.check_empty()
    return found


def without(layers: torch.nn.Module) -> list[list[torch.Tensor]]:
    found = []
    for i in range(3):
        x = batch(i).requires_grad_()
        layers(x).sum().backward()
        found.append(gradients(layers, x))
    return found


def assert_bitwise(actual: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert all(map(torch.equal, a, b))


def test_out_and_back_is_bitwise_the_same(store: ActivationStore) -> None:
    expected = without(model())
    layers = model()
    assert_bitwise(in_flight_together(layers, layers, store), expected)


def test_nothing_is_kept_after_the_backward(store: ActivationStore) -> None:
    came_back: list[StorageWeakRef] = []
    store.on_load = lambda _, storages: came_back.extend(map(StorageWeakRef, storages))
    layers = model()
    in_flight_together(layers, layers, store)
    gc.collect()
    assert len(came_back) >= 3
    assert all(storage.expired() for storage in came_back)


@pytest.mark.long
def test_compiled_layers() -> None:
    """torch.compile saves through Functions of its own, with sizes among what they keep.

    Not on the stand-in: torch does not compile while somebody watches its operations.
    """

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(HIDDEN)
            self.up = torch.nn.Linear(HIDDEN, 8 * HIDDEN)
            self.down = torch.nn.Linear(8 * HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    def blocks() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(Block() for _ in range(LAYERS)))

    layers = blocks()
    expected = without(layers)
    layers = blocks()
    compiled = torch.compile(layers, backend="aot_eager", dynamic=True)
    assert "Compiled" in compiled(batch(9).requires_grad_()).grad_fn.name()
    store = ActivationStore(lambda size: host_transport("0-1", size, CPU, 60.0))
    assert_bitwise(in_flight_together(layers, compiled, store), expected)
    store.close()
