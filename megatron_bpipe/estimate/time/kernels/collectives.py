"""Seconds of messages between ranks.  Units: bytes, bytes/s, seconds."""

from __future__ import annotations

from megatron_bpipe.estimate.hardware import Gpu

LATENCY = 20e-6
"""Of a collective inside a node: 22 to 26 us on eight B200 (SimuMax, configs/system)."""
NETWORK_LATENCY = 40e-6
NETWORK_SHARE = 0.9
"""Of a port's rate that large messages reach: 180 of 200 Gb/s is usual for nccl-tests."""
ALL_TO_ALL_SHARE = 0.6
"""Of NVLink's rate: 0.5968 on eight B200 (SimuMax, configs/system)."""


def gather_seconds(gpu: Gpu, ranks: int, size: float) -> float:
    """Gather, or scatter of a sum, of ``size`` bytes in all, over NVLink."""
    if ranks == 1:
        return 0.0
    return LATENCY + (ranks - 1) / ranks * size / (gpu.nvlink * gpu.link_share)


def reduce_seconds(gpu: Gpu, ranks: int, size: float) -> float:
    """Sum of ``size`` bytes that all ranks have then, over NVLink."""
    return 0.0 if ranks == 1 else 2 * gather_seconds(gpu, ranks, size) - LATENCY


def all_to_all_seconds(gpu: Gpu, ranks: int, local: int, size: float) -> float:
    """Each rank sends ``size`` bytes, evenly to all; ``local`` ranks are in one NVLink domain."""
    if ranks == 1:
        return 0.0
    inside = (min(local, ranks) - 1) / ranks * size / (gpu.nvlink * ALL_TO_ALL_SHARE)
    outside = max(0, ranks - local) / ranks * size / (gpu.network * NETWORK_SHARE)
    return LATENCY + max(inside, outside + (NETWORK_LATENCY if outside else 0.0))


def ring_bandwidth(gpu: Gpu, ranks: int, together: int) -> float:
    """Bytes/s of gathers among ranks of which ``together`` share a node, and so use its ports."""
    inside = gpu.nvlink * gpu.link_share
    if ranks <= together:
        return inside
    return min(inside, max(1, together) * gpu.network * NETWORK_SHARE)
