"""Which GPU this process has, and how it is linked to another one."""

from __future__ import annotations

from typing import Any

import torch

from megatron_bpipe.runtime.transport.pair.links import DeviceInfo, Link, plain_uuid

# nvml.h, nvmlGpuP2PCapsIndex_t; pynvml's own NVML_P2P_CAPS_INDEX_READ is a tuple by mistake
_P2P_WRITE, _P2P_NVLINK, _P2P_OK = 1, 2, 0


def device_info(device: torch.device) -> DeviceInfo:
    """Where this rank computes, and what it sees."""
    count = torch.cuda.device_count()
    visible = [plain_uuid(str(torch.cuda.get_device_properties(i).uuid)) for i in range(count)]
    index = device.index if device.index is not None else torch.cuda.current_device()
    return DeviceInfo(visible[index], tuple(visible))


def link_between(mine: DeviceInfo, theirs: DeviceInfo, one_host: bool) -> Link:
    """How this process's GPU is linked to the other one's.

    Whether CUDA can map the other GPU's memory says CUDA, where it shows that GPU to this process;
    what the link is made of says NVML, which shows all GPUs of the host.
    """
    if not one_host:
        return Link.NODE
    if mine.uuid == theirs.uuid:
        return Link.SAME_GPU
    if theirs.uuid in mine.visible:
        here, there = mine.visible.index(mine.uuid), mine.visible.index(theirs.uuid)
        if not torch.cuda.can_device_access_peer(here, there):
            return Link.HOST
        found = _nvml_link(mine.uuid, theirs.uuid)
        return Link.PCIE if found is Link.HOST else found  # CUDA has the last word
    return _nvml_link(mine.uuid, theirs.uuid)


def nvml_module() -> Any:
    """``pynvml`` (the package nvidia-ml-py) if it is installed; None otherwise."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _nvml_link(here: str, there: str) -> Link:
    """What NVML says of two GPUs of this host, by uuid; `Link.PEER` where it says nothing."""
    nvml = nvml_module()
    if nvml is None:
        return Link.PEER
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no such library in this container
        return Link.PEER
    try:
        pair = [nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode()) for uuid in (here, there)]
        if nvml.nvmlDeviceGetP2PStatus(*pair, _P2P_NVLINK) == _P2P_OK:
            return Link.NVLINK
        writes = nvml.nvmlDeviceGetP2PStatus(*pair, _P2P_WRITE) == _P2P_OK
        return Link.PCIE if writes else Link.HOST
    except nvml.NVMLError:  # a part of a GPU (MIG), or one that the container hides from NVML too
        return Link.PEER
    finally:
        nvml.nvmlShutdown()
