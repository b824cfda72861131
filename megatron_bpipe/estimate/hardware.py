"""GPUs: published peaks and one measured figure, each with its source.

Units: FLOP/s, bytes/s, GiB.  Bandwidths are one direction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_bpipe.estimate.errors import EstimateError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    ``flops`` is the dense bf16 peak; ``matmul_share`` what share of it a large bf16 matrix
    multiplication was measured to reach; ``nvlink`` the link to another GPU of the node (PCIe where
    there is no NVLink), ``network`` the port of one GPU to other nodes, ``host`` the way to its
    host's memory, both directions busy.
    """

    name: str
    flops: float
    matmul_share: float
    memory_gib: float
    memory_bandwidth: float
    nvlink: float
    network: float
    host: float = 15e9  # PCIe 4, as observed (datasheet: 32)


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
    host=30e9,  # PCIe 5 at the share of its datasheet's figure (64) that PCIe 4 was observed at
)
A100_40G = replace(
    A100_80G,
    name="A100-40GB",
    memory_gib=40960 / 1024,  # MiB as nvidia-smi reports
    memory_bandwidth=1.555e12,  # NVIDIA A100 40GB datasheet
)
H200 = replace(
    H100_80G,
    name="H200",
    matmul_share=794.5 / 989,  # the same table: "H200 is the same" as the H100
    memory_gib=143771 / 1024,  # MiB as nvidia-smi reports (NVIDIA/cuda-samples #311)
    memory_bandwidth=4.8e12,  # NVIDIA H200 datasheet
)
B200 = Gpu(
    name="B200",
    flops=2.25e15,  # NVIDIA HGX B200 datasheet, dense bf16, an eighth of the board's 18 PFLOP/s
    matmul_share=1745.0 / 2250,  # the same table, 1792 x 16128 x 3072
    memory_gib=183359 / 1024,  # MiB as nvidia-smi reports (NVIDIA/TensorRT-LLM #10278)
    memory_bandwidth=7.67e12,  # 7680 bits at 3996 MHz (pytorch/ao #4002; datasheet: 8)
    nvlink=900e9,  # NVLink 5: 1.8 TB/s in both directions together
    network=50e9,  # one 400 Gb/s port per GPU, as in a DGX B200
    host=30e9,
)
GPUS = {gpu.name: gpu for gpu in (A100_40G, A100_80G, H100_80G, H200, B200)}


# Names as the driver gives them, in full. Cards that share a chip but not its figures have other
# names and are not here: PCIe cards and NVL pairs, GH200 and GB200, parts of a GPU (MIG), A800 and
# H800, and chips built for one site (A100-SXM-64GB).
_DEVICE_NAMES = (
    (re.compile(r"(NVIDIA )?A100-SXM4?-40GB"), A100_40G),
    (re.compile(r"(NVIDIA )?A100-SXM4?-80GB"), A100_80G),
    (re.compile(r"NVIDIA H100 80GB HBM3"), H100_80G),
    (re.compile(r"NVIDIA H200"), H200),
    (re.compile(r"NVIDIA B200"), B200),
)


def recognised(device: str) -> Gpu | None:
    """The GPU whose device name this is, as the driver gives it; None if it is none of these."""
    return next((gpu for name, gpu in _DEVICE_NAMES if name.fullmatch(device)), None)


def gpu_named(name: str) -> Gpu:
    """A GPU by name; raises EstimateError naming those that exist."""
    if name not in GPUS:
        raise EstimateError(f"GPU {name!r} is not known: use {', '.join(GPUS)}")
    return GPUS[name]
