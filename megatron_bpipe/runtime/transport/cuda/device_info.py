"""Which GPU this process has, and how it is linked to another one."""

from __future__ import annotations

import shutil
import subprocess

import torch

from megatron_bpipe.runtime.transport.pair.links import (
    DeviceInfo,
    Link,
    classify,
    parse_index,
    parse_topology,
    plain_uuid,
)


def device_info(device: torch.device) -> DeviceInfo:
    """Where this rank computes, and what it sees."""
    count = torch.cuda.device_count()
    visible = [plain_uuid(str(torch.cuda.get_device_properties(i).uuid)) for i in range(count)]
    index = device.index if device.index is not None else torch.cuda.current_device()
    return DeviceInfo(visible[index], tuple(visible))


def link_between(mine: DeviceInfo, theirs: DeviceInfo, one_host: bool) -> Link:
    """How this process's GPU is linked to the other one's."""
    if not one_host:
        return Link.NODE
    if mine.uuid == theirs.uuid:
        return Link.SAME_GPU
    if theirs.uuid not in mine.visible:
        return Link.HOST
    here, there = mine.visible.index(mine.uuid), mine.visible.index(theirs.uuid)
    if not torch.cuda.can_device_access_peer(here, there):
        return Link.HOST
    names = parse_index(_nvidia_smi("--query-gpu=index,uuid", "--format=csv,noheader"))
    matrix = parse_topology(_nvidia_smi("topo", "-m"))
    row, column = names.get(mine.uuid), names.get(theirs.uuid)
    known = row is not None and column is not None
    return classify(matrix.get((row, column)) if known else None)  # type: ignore[arg-type]


def _nvidia_smi(*arguments: str) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run(
            [tool, *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
