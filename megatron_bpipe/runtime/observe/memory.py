"""What is really in memory: live storages of each micro-batch, and the allocator's own number."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_bpipe.runtime.graph import memory_of, roots_of, saved_tensors
from megatron_bpipe.runtime.torch_internals import storage_behind, storage_id
from megatron_bpipe.schedule.ops import ActivationKey

_MALLINFO2_FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo2(ctypes.Structure):
    # glibc's struct mallinfo2, malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2_FIELDS]


@functools.cache
def _mallinfo2() -> Any:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc >= 2.33
    if function is not None:
        function.restype = _Mallinfo2
    return function


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes the allocator has handed out: caching allocator on CUDA, malloc on CPU.

    None where the C library cannot say.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    function = _mallinfo2()
    if function is None:
        return None
    info = function()
    return int(info.uordblks + info.hblkhd)


def peak_watch(device: torch.device) -> Callable[[], Callable[[], int]] | None:
    """What starts to watch the allocator's peak; None where it keeps none.

    torch builds all its statistics for one number, so it is asked once an iteration, not once a
    node. ``torch.cuda.max_memory_allocated`` then counts from the start of the last iteration.
    """
    if device.type != "cuda":
        return None

    def watch() -> Callable[[], int]:
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)

    return watch


def static_bytes(device_type: str) -> int:
    """Bytes of all tensors that Python can reach now: between iterations parameters, gradients and
    optimizer state.

    Storages that wrap somebody else's memory (a mapped pool, a dataset) are not counted.
    """
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == device_type:
            storage = thing.untyped_storage()
            if storage.resizable():
                storages[storage_id(storage)] = storage.nbytes()
    return sum(storages.values())


def device_bytes() -> int | None:
    """Memory of this rank's GPU; None on a CPU, whose memory the ranks share."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


# token ids, labels, masks: a data iterator may hold them until the iteration is over
DATA = frozenset((torch.int64, torch.int32, torch.bool))


@dataclass(slots=True)
class _Tracked:
    reference: StorageWeakRef
    key: ActivationKey
    data: bool = False


@dataclass
class LiveActivations:
    """Weak references to everything autograd saved, so that nothing here keeps it alive.

    A storage that several micro-batches save (a mask, a rotary table) is counted once, with the
    first of them. One that outlives the iteration (a quantised weight's cache) is no activation:
    it is known from then on and not counted again. How much of a micro-batch is there is told
    without `DATA`, which others hold too.
    """

    _tracked: dict[int, _Tracked] = field(default_factory=dict)
    _totals: dict[ActivationKey, int] = field(default_factory=dict)
    _data: dict[ActivationKey, int] = field(default_factory=dict)
    _over: set[ActivationKey] = field(default_factory=set)
    _lasting: dict[int, StorageWeakRef] = field(default_factory=dict)

    def track_graph(self, key: ActivationKey, output: object, excluded: Collection[int]) -> None:
        """Track what the finished graph of ``output`` saved.

        ``excluded`` are `storage_id` of storages that are no activations: parameters, buffers.
        """
        storages: list[torch.UntypedStorage] = []
        data: list[torch.UntypedStorage] = []
        for saved in saved_tensors(roots_of(output)):
            is_data = saved.tensor is not None and saved.tensor.dtype in DATA
            (data if is_data else storages).extend(
                one for one in memory_of(saved) if storage_id(one) not in excluded
            )
        self._over.discard(key)
        self._totals[key] = self.track(key, storages)
        self._data[key] = self.track(key, data, data=True)

    def track(
        self, key: ActivationKey, storages: Iterable[torch.UntypedStorage], *, data: bool = False
    ) -> int:
        """Track ``storages`` as those of ``key``; returns the bytes new to the books."""
        new = 0
        for storage in storages:
            number = storage_id(storage)
            lasting = self._lasting.get(number)
            if lasting is not None and not lasting.expired():
                continue
            known = self._tracked.get(number)
            if known is None or known.reference.expired():
                self._tracked[number] = _Tracked(StorageWeakRef(storage), key, data)
                new += storage.nbytes()
        return new

    def sample(self, parts: int = 1) -> tuple[int, int]:
        """Live bytes, and how many units: a unit of ``parts`` counts from half of its bytes on."""
        alive: dict[ActivationKey, int] = {}
        data = 0
        for number, entry in list(self._tracked.items()):
            storage = storage_behind(entry.reference)
            if storage is None:
                del self._tracked[number]
            elif entry.data:
                data += storage.nbytes()
            else:  # what was emptied in place has no bytes now
                alive[entry.key] = alive.get(entry.key, 0) + storage.nbytes()
        present = sum(
            min(parts, (2 * parts * size + total) // (2 * total))
            for key, size in alive.items()
            if size and (total := max(1, self._totals[key]))
        )
        return sum(alive.values()) + data, present

    def backward_over(self, key: ActivationKey) -> None:
        """The schedule is done with an activation: what is left of it somebody else holds."""
        self._over.add(key)

    def left_behind(self) -> int:
        """Live bytes of activations that the schedule is done with."""
        entries = [entry for entry in self._tracked.values() if entry.key in self._over]
        storages = (storage_behind(entry.reference) for entry in entries)
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def bytes_of(self, key: ActivationKey) -> int:
        """What `track_graph` found for this one, 0 for one that it has not seen."""
        return self._totals.get(key, 0) + self._data.get(key, 0)

    def known(self) -> Collection[int]:
        """`storage_id` of all storages in the books."""
        return self._tracked.keys() | self._lasting.keys()

    def clear(self) -> None:
        """The next iteration begins: whatever is still alive outlives its micro-batch."""
        for number, entry in self._tracked.items():
            if not entry.reference.expired():
                self._lasting[number] = entry.reference
        for number in [n for n, reference in self._lasting.items() if reference.expired()]:
            del self._lasting[number]
        for books in (self._tracked, self._totals, self._data, self._over):
            books.clear()


def storage_ids(module: torch.nn.Module) -> set[int]:
    """`storage_id` of all storages that hold parameters, their gradients and buffers."""
    found = set()
    for parameter in module.parameters():
        for tensor in (parameter, parameter.grad, getattr(parameter, "main_grad", None)):
            if tensor is not None:
                found.add(storage_id(tensor.untyped_storage()))
    for _, buffer in module.named_buffers():
        found.add(storage_id(buffer.untyped_storage()))
    return found
