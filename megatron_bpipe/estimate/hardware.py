"""GPUs: published peaks and one measured figure, each with its source.

Units: FLOP/s, bytes/s, GiB.  Bandwidths are one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.errors import EstimateError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    ``flops`` is the dense bf16 peak; ``matmul_share`` what share of it a large bf16 matrix
    multiplication was measured to reach; ``network`` the port of one GPU to other nodes.
    """

    name: str
    flops: float
    matmul_share: float
    memory_gib: float
    memory_bandwidth: float
    nvlink: float
    network: float


A100_80G = Gpu(
    name="A100-80GB",
    flops=312e12,  # NVIDIA A100 datasheet, dense bf16
    # 267.9 of 312 TFLOP/s at 6912 x 16384 x 2048: table of maximum achievable matmul FLOPS in
    # github.com/stas00/ml-engineering, compute/accelerator
    matmul_share=267.9 / 312,
    memory_gib=80.0,  # as the paper names it (section 3.1)
    memory_bandwidth=2.039e12,  # NVIDIA A100 80GB SXM datasheet
    nvlink=300e9,  # NVLink 3: 600 GB/s in both directions together
    network=25e9,  # one 200 Gb/s port per GPU, as in a DGX A100
)
H100_80G = Gpu(
    name="H100-80GB",
    flops=989e12,  # NVIDIA H100 SXM datasheet, dense bf16
    matmul_share=792.1 / 989,  # the same table, 6144 x 17920 x 2816
    memory_gib=80.0,
    memory_bandwidth=3.35e12,  # NVIDIA H100 SXM datasheet
    nvlink=450e9,  # NVLink 4: 900 GB/s in both directions together
    network=50e9,  # one 400 Gb/s port per GPU, as in a DGX H100
)
GPUS = {gpu.name: gpu for gpu in (A100_80G, H100_80G)}


def gpu_named(name: str) -> Gpu:
    """A GPU by name; raises EstimateError naming those that exist."""
    if name not in GPUS:
        raise EstimateError(f"GPU {name!r} is not known: use {' or '.join(GPUS)}")
    return GPUS[name]
