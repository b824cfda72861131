"""Memory reports: the process's own memory in the place of the GPU's.

Megatron prints four figures after the first iteration
(``training/utils/common_utils.py``, ``report_memory``). "Allocated" is what this
process has in physical memory, its peak likewise; the CPU has no caching allocator,
so "reserved" is the same. This includes Python and its libraries: it is far too
coarse to see activations come and go.
"""

import os
import resource

import torch

from megatron_bpipe.integration.cpu.replace import replace


def _resident_bytes(device: object = None) -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes(device: object = None) -> int:
    # The kernel updates the two figures at different moments: the peak can lag.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(peak, _resident_bytes())


def _stats(device: object = None) -> dict[str, int]:
    """Return the counters that Megatron reads of ``torch.cuda.memory_stats``."""
    now, peak = _resident_bytes(), _peak_resident_bytes()
    stats = {}
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        stats[f"{kind}.all.current"] = now
        stats[f"{kind}.all.peak"] = peak
    stats["allocation.all.current"] = 0
    stats["num_alloc_retries"] = 0
    stats["num_ooms"] = 0
    return stats


def install() -> None:
    """Answer questions about GPU memory with the process's own."""
    for module in (torch.cuda, torch.cuda.memory):
        replace(
            module,
            device_memory_used=_resident_bytes,
            empty_cache=lambda: None,
            max_memory_allocated=_peak_resident_bytes,
            max_memory_reserved=_peak_resident_bytes,
            memory_allocated=_resident_bytes,
            memory_reserved=_resident_bytes,
            memory_stats=_stats,
            reset_peak_memory_stats=lambda device=None: None,
        )
