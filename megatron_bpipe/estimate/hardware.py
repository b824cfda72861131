"""GPUs: datasheet figures, and what large kernels were measured to reach of them.

Units: FLOP/s, bytes/s, GiB, seconds.  Bandwidths are one direction.

Measured shares and their sources.  None is from a training run:

* ``matmul_share``: bf16 matrix products one after the other, at the power that they then draw, with
  tiles that fill the GPU.  A100 and B200: medians of the tables of measured kernels in
  github.com/MooreThreads/SimuMax (configs/system, May 2026; 183 products of an A100 PCIe, 514 of a
  B200), quantization divided out (``time/matrix_products.py``); the A100 SXM is that PCIe card
  times 86.9/81.1, the ratio of both in the table of maximum achievable matmul FLOPS of
  github.com/stas00/ml-engineering (compute/accelerator).  H100 and H200: 720 of 989 TFLOP/s on the
  shapes of training (SemiAnalysis, MI300X vs H100 vs H200, December 2024; MI300X 620 of 1307),
  0.93 of it quantization.  Others: that table's maximum times what the nearest of these keeps.
* ``attention``: flash attention, causal, heads of 128, forwards and backwards.  A100, B200: the
  same tables.  H100: FlashAttention-3 (arXiv 2407.08608, figures 5 and 6).
* ``memory_share``: A100 and B200: the same tables (0.91, 0.67); H100: a device-to-device copy,
  3.02-3.09 of 3.35 TB/s.
* ``link_share``: gathers and scatters over NVLink.  A100: 235 of 300 GB/s (ml-engineering,
  network); B200: 606 of 900 (SimuMax); H100: 0.78 as on the A100.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from megatron_bpipe.estimate.errors import EstimateError

Architecture = Literal["volta", "ampere", "ada", "hopper", "blackwell", "cdna3"]


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    ``flops`` is the dense bf16 peak (fp16 where there is no bf16); ``matmul_share`` what share of
    it matrix products reach; ``nvlink`` the link to another GPU of the node (PCIe where there is no
    NVLink), ``network`` the port of one GPU to other nodes, ``host`` the way to its host's memory,
    both directions busy.  ``attention`` is the share of the peak that flash attention reaches
    forwards and backwards, the masked half not counted.  ``sms`` how many tiles run at once.
    ``domain`` is how many GPUs NVLink joins, where that is more than a machine (``node``) has.
    """

    name: str
    flops: float
    matmul_share: float
    memory_gib: float
    memory_bandwidth: float
    nvlink: float
    network: float
    host: float = 15e9  # PCIe 4, as observed (datasheet: 32)
    memory_share: float = 0.9
    link_share: float = 0.78
    attention: tuple[float, float] = (0.58, 0.48)
    sms: int = 132
    architecture: Architecture = "hopper"
    node: int = 8
    domain: int = 8

    @property
    def has_bf16(self) -> bool:
        """Whether tensor cores compute in bf16 (and flash attention runs): from Ampere on."""
        return self.architecture != "volta"

    @property
    def serial_connections(self) -> bool:
        """Whether Megatron asks for CUDA_DEVICE_MAX_CONNECTIONS=1 with TP or CP above 1."""
        return self.architecture not in ("blackwell", "cdna3")


A100_80G = Gpu(
    name="A100-80GB",
    flops=312e12,  # NVIDIA A100 datasheet, dense bf16
    matmul_share=0.775 * 86.9 / 81.1,
    memory_gib=80.0,  # as the re-evaluation names it (section 3.1)
    memory_bandwidth=2.039e12,  # NVIDIA A100 80GB SXM datasheet
    nvlink=300e9,  # NVLink 3: 600 GB/s in both directions together
    network=25e9,  # one 200 Gb/s port per GPU, as in a DGX A100
    memory_share=0.91,
    attention=(0.59, 0.50),
    sms=108,
    architecture="ampere",
)
H100_80G = Gpu(
    name="H100-80GB",
    flops=989e12,  # NVIDIA H100 SXM datasheet, dense bf16
    matmul_share=720 / 989 / 0.93,
    memory_gib=80.0,
    memory_bandwidth=3.35e12,  # NVIDIA H100 SXM datasheet
    nvlink=450e9,  # NVLink 4: 900 GB/s in both directions together
    network=50e9,  # one 400 Gb/s port per GPU, as in a DGX H100
    host=30e9,  # PCIe 5 at the share of its datasheet's figure (64) that PCIe 4 was observed at
    memory_share=0.92,
    attention=(0.58, 0.47),
    sms=132,
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
    memory_gib=143771 / 1024,  # MiB as nvidia-smi reports (NVIDIA/cuda-samples #311)
    memory_bandwidth=4.8e12,  # NVIDIA H200 datasheet
)
B200 = Gpu(
    name="B200",
    flops=2.25e15,  # NVIDIA HGX B200 datasheet, dense bf16, an eighth of the board's 18 PFLOP/s
    matmul_share=0.51,
    memory_gib=183359 / 1024,  # MiB as nvidia-smi reports (NVIDIA/TensorRT-LLM #10278)
    memory_bandwidth=7.67e12,  # 7680 bits at 3996 MHz (pytorch/ao #4002; datasheet: 8)
    nvlink=900e9,  # NVLink 5: 1.8 TB/s in both directions together
    network=50e9,  # one 400 Gb/s port per GPU, as in a DGX B200
    host=30e9,
    memory_share=0.67,
    link_share=0.67,
    attention=(0.587, 0.424),
    sms=148,
    architecture="blackwell",
)
B300 = replace(
    B200,
    name="B300",
    matmul_share=0.51 * 1769 / 1745,
    memory_gib=275040 / 1024,  # MiB as nvidia-smi reports (datasheet: 288 GB)
    network=100e9,  # one 800 Gb/s port per GPU, as in a DGX B300
)
GB200 = replace(
    B200,
    name="GB200",
    flops=2.5e15,  # NVIDIA GB200 NVL72 datasheet: 180 PFLOP/s of 72, dense
    matmul_share=0.51 * 0.729 / 0.776 * 1.2,  # 1200 W in place of 1000, clocks bound by power
    memory_gib=189471 / 1024,  # MiB as nvidia-smi reports (datasheet: 186 GB)
    host=200e9,  # NVLink-C2C to Grace, 450 in one direction by the datasheet
    node=4,
    domain=72,
)
GB300 = replace(
    GB200,
    name="GB300",
    memory_gib=284208 / 1024,  # MiB as nvidia-smi reports (datasheet: 288 GB)
    network=100e9,
)
V100 = Gpu(
    name="V100-32GB",
    flops=125e12,  # NVIDIA V100 SXM2 datasheet, fp16
    matmul_share=94.0 / 125,  # github.com/mag-/gpu_benchmark, V100-SXM2-32GB
    memory_gib=32768 / 1024,
    memory_bandwidth=0.9e12,
    nvlink=150e9,  # NVLink 2: 300 GB/s in both directions together
    network=12.5e9,  # 100 Gb/s, as in a DGX-2
    host=7.5e9,
    memory_share=0.9,
    sms=80,
    architecture="volta",
)
L40S = Gpu(
    name="L40S",
    flops=362e12,  # NVIDIA L40S datasheet, dense
    matmul_share=252.0 / 362,  # github.com/mag-/gpu_benchmark
    memory_gib=46068 / 1024,  # MiB as nvidia-smi reports
    memory_bandwidth=0.864e12,
    nvlink=25e9,  # no NVLink: PCIe 4 x16, 32 GB/s by the datasheet
    network=12.5e9,
    sms=142,
    architecture="ada",
)
MI300X = Gpu(
    name="MI300X",
    flops=1307e12,  # AMD MI300X datasheet, dense bf16
    matmul_share=620 / 1307 / 0.93,
    memory_gib=192.0,
    memory_bandwidth=5.3e12,
    nvlink=448e9,  # Infinity Fabric: seven links of 64 GB/s in one direction
    network=50e9,
    host=30e9,
    memory_share=0.8,
    link_share=313 / 448,  # measured with 8 GPUs, ml-engineering, network
    attention=(0.3, 0.22),
    sms=304,
    architecture="cdna3",
)
GPUS = {
    gpu.name: gpu
    for gpu in (
        *(V100, A100_40G, A100_80G, L40S, H100_80G, H200, B200, B300, GB200, GB300, MI300X),
    )
}


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
