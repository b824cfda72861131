"""What optional layers save that leaves with a micro-batch: the rest stays, and training is right.

Each case trains nothing: one forward, out, back, one backward, compared bitwise; and the share of
the allocator's bytes that left is printed with ``-rP``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_bpipe.runtime.store import ActivationStore
from megatron_bpipe.runtime.transport.host.own import host_transport
from tests.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU
# read when the libraries start; bitwise comparison needs sums in one order
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
Layer = Callable[[torch.Tensor], torch.Tensor]
SEQUENCE, BATCH, HEADS, SIZE = 1024, 2, 8, 64
HIDDEN = HEADS * SIZE


def sdpa() -> Layer:
    def attend(x: torch.Tensor) -> torch.Tensor:
        q = x.view(BATCH, SEQUENCE, HEADS, SIZE).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, q * 2, q * 3, is_causal=True)
        return out.transpose(1, 2).reshape_as(x)

    return attend


def flash_attention() -> Layer:
    flash = importlib.import_module("flash_attn")
    # its backward adds up with atomics unless it is told not to

    def attend(x: torch.Tensor) -> torch.Tensor:
        q = x.view(BATCH, SEQUENCE, HEADS, SIZE)
        return flash.flash_attn_func(q, q * 2, q * 3, causal=True, deterministic=True).reshape_as(x)

    return attend


def apex_norm() -> Layer:
    norms = importlib.import_module("apex.normalization")
    return norms.FusedLayerNorm(HIDDEN).cuda().to(torch.bfloat16)


def transformer_engine() -> Layer:
    te = importlib.import_module("transformer_engine.pytorch")
    return te.LayerNormMLP(HIDDEN, 4 * HIDDEN, params_dtype=torch.bfloat16)


def transformer_engine_fp8() -> Layer:
    te = importlib.import_module("transformer_engine.pytorch")
    mlp = te.LayerNormMLP(HIDDEN, 4 * HIDDEN, params_dtype=torch.bfloat16)

    def under_fp8(x: torch.Tensor) -> torch.Tensor:
        with te.fp8_autocast(enabled=True):
            return mlp(x)

    return under_fp8


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "make", [sdpa, flash_attention, apex_norm, transformer_engine, transformer_engine_fp8]
)
def test_out_and_back_is_bitwise_the_same(make: Callable[[], Layer]) -> None:
    try:
        layer = make()
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(3)
    values = torch.randn(BATCH, SEQUENCE, HIDDEN, device=device, dtype=torch.bfloat16)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        x = values.clone().requires_grad_()
        return x, layer(x * 1.0)

    def gradient(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output.float().square().mean().backward()
        return x.grad.clone()

    for _ in range(3):  # workspaces, fp8 scales
        gradient(*forward())
    expected = gradient(*forward())
    store = ActivationStore(lambda size: host_transport("0-1", size, device, 60.0))
    before = torch.cuda.memory_allocated()
    x, output = forward()
    held = torch.cuda.memory_allocated() - before
    store.measure(0, output)
    store.capture(0, output)
    moved = store.evict(0)
    store.finish_evict(0)
    freed = before + held - torch.cuda.memory_allocated()
    print(f"{make.__name__}: a forward holds {held} bytes, {moved} left, {freed} were freed")  # noqa: T201
    assert freed >= 0.95 * moved
    store.load(0)
    store.finish_load(0)
    assert torch.equal(gradient(x, output), expected)
    store.consume(0)
    store.close()
