"""GPUs by the names that drivers give them."""

from __future__ import annotations

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import GPUS, gpu_named, recognised


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100-SXM4-40GB", "A100-40GB"),  # older drivers leave the maker out
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("A100-SXM-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_devices_are_recognised(device: str, name: str) -> None:
    assert recognised(device) is GPUS[name]


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H800",
        "NVIDIA H20",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GH200 120GB",
        "NVIDIA GB200",
        "NVIDIA B300 SXM6 AC",
        "NVIDIA GeForce RTX 4090",
        "Tesla V100-SXM2-32GB",
        "",
    ],
)
def test_cards_with_other_figures_are_not(device: str) -> None:
    assert recognised(device) is None


def test_a_wrong_name_is_answered_with_those_that_exist() -> None:
    with pytest.raises(EstimateError, match=r"GPU 'H100' is not known: use .*A100-40GB, .*, B200"):
        gpu_named("H100")
