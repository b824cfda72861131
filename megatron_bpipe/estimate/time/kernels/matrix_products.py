"""Seconds of one matrix product: peak, tiles that do not fill the GPU, memory.

A product of m x k by k x n is cut into tiles of m x n, each computed by one multiprocessor along
all of k.  Tiles that reach over the edge, and a last wave of tiles that leaves multiprocessors
idle, do no work (NVIDIA, Matrix Multiplication Background User's Guide: tile and wave
quantization); filling and draining the pipeline of a tile takes as long as ``PROLOGUE`` steps of k.
Smaller tiles waste less but read more, so the library's choice is the best of ``TILES``, each with
its own efficiency.  Both figures follow the 183 products measured on an A100 in
github.com/MooreThreads/SimuMax to 3 % on average (5 % without).

Units: seconds, FLOP/s, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_bpipe.estimate.hardware import Gpu

TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.93), (64, 128, 0.75), (128, 64, 0.75))
"""Rows, columns, efficiency relative to the largest."""
PROLOGUE = 128
GROUPED = 0.88
"""A product of many experts at once against one of them that fills the GPU alike: 0.68 of the peak
against 0.77 in the same tables, experts of 1232 rows."""
KERNEL = 5e-6
"""Seconds from one kernel's end to the next one's, and its first wave's start."""


@dataclass(frozen=True)
class Product:
    """A linear layer on one GPU: its input has ``m`` rows of ``k``, its output rows of ``n``.

    ``groups`` layers alike share the GPU at once (experts), each with ``m`` rows.
    """

    m: int
    n: int
    k: int
    groups: int = 1


@lru_cache(maxsize=65536)
def product_seconds(
    gpu: Gpu, m: int, n: int, k: int, element: int = 2, groups: int = 1, accumulated: int = 0
) -> float:
    """One product; ``element`` bytes (4: half the rate).

    ``accumulated`` bytes are read and written besides for every element of the result.
    """
    if not (m and n and k):
        return 0.0
    rate = gpu.flops * gpu.matmul_share * (2 / element) * fill(gpu.sms, m, n, k, groups)
    rate *= GROUPED if groups > 1 else 1.0
    moved = groups * (element * (m * k + k * n + m * n) + accumulated * m * n)
    memory = moved / (gpu.memory_bandwidth * gpu.memory_share)
    return max(2.0 * groups * m * n * k / rate, memory) + KERNEL


def fill(sms: int, m: int, n: int, k: int, groups: int = 1) -> float:
    """What share of the multiprocessors' time is work, with the best tile."""
    best = 0.0
    for rows, columns, efficiency in TILES:
        tiles = groups * -(-m // rows) * -(-n // columns)
        waves = -(-tiles // sms)
        best = max(best, efficiency * groups * m * n / (waves * sms * rows * columns))
    return best * k / (k + PROLOGUE)


def forward_backward(
    gpu: Gpu, product: Product, element: int = 2, *, fused: bool = True
) -> tuple[float, float, float]:
    """A linear layer: its product, that of its input's gradient, that of its weights'.

    The last is added to fp32 gradients: in the product (``fused``) or afterwards.
    """
    m, n, k, groups = product.m, product.n, product.k, product.groups
    added = 8 if fused else 0
    weights = product_seconds(gpu, k, n, m, element, groups, added)
    if not fused:
        weights += (element + 8) * groups * k * n / (gpu.memory_bandwidth * gpu.memory_share)
    return (
        product_seconds(gpu, m, n, k, element, groups),
        product_seconds(gpu, m, k, n, element, groups),
        weights,
    )
