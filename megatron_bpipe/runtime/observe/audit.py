"""Where a forward's memory went: what can leave, what stays and why, what no hook sees.

    allocated = evictable + kept (new) + output + not captured

*Not captured* is what the allocator gave out that autograd did not save: for example tensors that
a custom Function keeps as attributes of its context.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_bpipe.runtime.graph import Kept, roots_of, saved_graph
from megatron_bpipe.runtime.torch_internals import storage_id

LARGEST_SITES = 8
# kept, but allocated by the forward all the same, unless an earlier micro-batch had it too
OF_THE_FORWARD = (Kept.SHARED, Kept.SPECIAL, Kept.HOOKED, Kept.CHANGED)


@dataclass(frozen=True)
class Site:
    """One storage that stays."""

    node: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Audit:
    """One micro-batch's forward on one stage; in bytes but for the last.

    ``unread_slots`` are saved tensors that somebody's hooks hold in a form of their own
    (non-reentrant checkpoints, offloading): left alone, so their bytes are unknown.
    """

    microbatch: int
    allocated_bytes: int | None
    evictable_bytes: int
    kept_bytes: dict[str, int]
    output_bytes: int
    not_captured_bytes: int | None
    kept_sites: tuple[Site, ...]
    unread_slots: int

    def document(self) -> dict[str, Any]:
        """As it stands in ``memory.json``."""
        return asdict(self)


def audit_forward(
    microbatch: int,
    output: object,
    allocated: int | None,
    parameters: Collection[int],
    known: Collection[int],
) -> Audit:
    """Account for the memory of a forward that has just ended.

    Args:
        microbatch: its number.
        output: what the stage returned.
        allocated: what the allocator gave out during this forward and has not got back.
        parameters: `storage_id` of the model's own storages.
        known: `storage_id` of storages that earlier micro-batches saved too.
    """
    evictable = new = 0
    kept = dict.fromkeys((why.value for why in Kept), 0)
    sites = []
    graph = saved_graph(roots_of(output), parameters)
    for entry in graph.storages:
        size = entry.storage.nbytes()
        if entry.kept is None:
            evictable += size
            continue
        kept[entry.kept.value] += size
        if entry.kept in OF_THE_FORWARD and storage_id(entry.storage) not in known:
            new += size
        dtype = str(entry.dtype).removeprefix("torch.")
        sites.append(Site(entry.node, entry.shape, dtype, size, entry.kept.value))
    outputs = output if isinstance(output, (list, tuple)) else [output]
    sent = sum(t.untyped_storage().nbytes() for t in outputs if isinstance(t, torch.Tensor))
    missed = None if allocated is None else max(0, allocated - evictable - new - sent)
    largest = sorted(sites, key=lambda site: -site.bytes)[:LARGEST_SITES]
    unread = graph.unread_slots
    return Audit(microbatch, allocated, evictable, kept, sent, missed, tuple(largest), unread)
