"""How two GPUs are linked, from CUDA and from NVML: the real package on a stand-in library."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bpipe.runtime.transport.cuda import device_info
from megatron_bpipe.runtime.transport.cuda.device_info import link_between
from megatron_bpipe.runtime.transport.pair.links import DeviceInfo, Link
from tests.harness.stand_in_gpu import NEEDS_COMPILER, library, number, simulated_gpu

pytestmark = NEEDS_COMPILER
NO_NVLINK, NO_PEER_ACCESS = 5, 1  # not supported; chipset not supported


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """NVML of the stand-in; numbers there are nvmlGpuP2PStatus_t."""
    pynvml = pytest.importorskip("pynvml")
    with simulated_gpu():
        stand_in = library()
        monkeypatch.setattr(pynvml, "nvmlLib", None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.setattr(pynvml, "CDLL", lambda name: stand_in)
        yield pynvml
        number("p2p_nvlink", 0)
        number("p2p_write", 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceInfo, DeviceInfo]:
    """Two GPUs that both ranks see, with peer access."""
    uuids = [SimpleNamespace(uuid=name) for name in ("aaa", "bbb")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: uuids[index])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: True)
    here, there = (device_info.device_info(torch.device("cuda", i)) for i in range(2))
    assert here == DeviceInfo("aaa", ("aaa", "bbb"))
    return here, there


def test_nvlink_is_told_from_pcie(nvml: Any, two_gpus: Any) -> None:
    here, there = two_gpus
    assert link_between(here, there, one_host=True) is Link.NVLINK
    number("p2p_nvlink", NO_NVLINK)
    assert link_between(here, there, one_host=True) is Link.PCIE
    assert link_between(here, here, one_host=True) is Link.SAME_GPU
    assert link_between(here, there, one_host=False) is Link.NODE


def test_whether_memory_can_be_mapped_says_cuda(
    nvml: Any, two_gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    number("p2p_nvlink", NO_NVLINK)
    number("p2p_write", NO_PEER_ACCESS)
    assert link_between(*two_gpus, one_host=True) is Link.PCIE
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: False)
    number("p2p_nvlink", 0)
    assert link_between(*two_gpus, one_host=True) is Link.HOST


def test_a_gpu_that_cuda_hides_is_looked_up_all_the_same(nvml: Any) -> None:
    """As under srun --gpus-per-task, where each rank sees its own GPU alone."""
    here, there = DeviceInfo("aaa", ("aaa",)), DeviceInfo("bbb", ("bbb",))
    assert link_between(here, there, one_host=True) is Link.NVLINK
    number("p2p_nvlink", NO_NVLINK)
    assert link_between(here, there, one_host=True) is Link.PCIE
    number("p2p_write", NO_PEER_ACCESS)
    assert link_between(here, there, one_host=True) is Link.HOST


def test_what_nvml_does_not_know_is_said_to_be_unknown(
    nvml: Any, two_gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = DeviceInfo("MIG-1", ("MIG-1",))
    assert link_between(part, DeviceInfo("MIG-2", ("MIG-2",)), one_host=True) is Link.PEER
    monkeypatch.setattr(nvml, "nvmlLib", None)
    monkeypatch.setattr(nvml, "CDLL", ctypes.CDLL)  # there is none on this machine
    assert link_between(*two_gpus, one_host=True) is Link.PEER
    monkeypatch.setattr(device_info, "nvml_module", lambda: None)
    assert link_between(*two_gpus, one_host=True) is Link.PEER
