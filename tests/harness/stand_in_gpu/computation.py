"""What the computing stream has been given, so that a copy that starts too early can be seen.

Computation runs at once here, on a CPU. On a GPU it is only queued, and a copy on another stream
may run before it unless that stream was made to wait. So every operation gets a number, events
carry the number of the last operation before them, and a copy knows the operations that its stream
has waited for. If a later one writes what the copy reads, or touches what the copy writes, the copy
would have been too early: it is a violation, and the copy delivers garbage.

Also known is where tensors begin and end, so that a copy past an end is refused.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

REMEMBERED = 4096  # operations; whoever waits for the computation at all is not so far behind
Range = tuple[int, int]  # first and one-past-last address
# these change where a tensor looks, and touch no memory
WITHOUT_WORK = frozenset(("aten::set_", "aten::detach_", "aten::resize_"))


class Operation(NamedTuple):
    """One operation and the memory it touches."""

    number: int
    name: str
    reads: list[Range]
    writes: list[Range]


class Computation(TorchDispatchMode):
    """Numbers the operations of the thread that entered it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0  # number of the last operation
        self.done = 0  # number of the last that the host has waited for
        self._recent: deque[Operation] = deque(maxlen=REMEMBERED)
        self._starts: list[int] = []
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}  # end, by start
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to compile; skipping would import the compiler

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run and note an operation."""
        kwargs = kwargs or {}
        if function is torch.ops.aten.detach.default and not isinstance(args[0], torch.Tensor):
            # a saved Python number, which torch hands over as what it was made from
            kind = torch.float64 if isinstance(args[0], float) else torch.int64
            return torch.scalar_tensor(args[0], dtype=kind)
        result = function(*args, **kwargs)
        if not self._paused:
            given = [*args, *kwargs.values()]
            for tensor in _tensors([*given, result]):
                self._know(tensor)
            is_view, written = _of(function)
            if not is_view:
                names = [argument.name for argument in function._schema.arguments]
                targets = [args[i] if i < len(args) else kwargs.get(names[i]) for i in written]
                self.now += 1
                writes = [_range(t) for t in _tensors([*targets, result])]
                reads = [_range(t) for t in _tensors(given)]
                self._recent.append(Operation(self.now, str(function), reads, writes))
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is the work of another stream."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def too_early(self, target: int, source: int, size: int, known: int) -> str | None:
        """The operation that a copy should have waited for and has not.

        Args:
            target: address.
            source: address.
            size: in bytes.
            known: number of the last operation that the copy comes after.
        """
        known = max(known, self.done)
        for operation in reversed(self._recent):
            if operation.number <= known:
                return None
            if any(_overlap(span, source, size) for span in operation.writes):
                return f"{operation.name} still makes what is copied"
            if any(_overlap(span, target, size) for span in [*operation.reads, *operation.writes]):
                return f"{operation.name} still uses where it is copied to"
        return None

    def past_an_end(self, address: int, size: int) -> bool:
        """Whether ``size`` bytes from an address within a tensor's memory reach past its end."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return False
        end, storage = self._storages[self._starts[at]]
        return address < end < address + size and not storage.expired()

    def _know(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        except (NotImplementedError, RuntimeError):  # a wrapper without memory of its own
            return
        known = self._storages.get(start)
        if start == end or (known is not None and known[0] == end and not known[1].expired()):
            return
        first = max(0, bisect.bisect_right(self._starts, start) - 1)
        last = bisect.bisect_left(self._starts, end)
        for other in self._starts[first:last]:  # memory that was given to others since
            if self._storages[other][0] > start:
                del self._storages[other]
                self._starts.remove(other)
        bisect.insort(self._starts, start)
        self._storages[start] = end, StorageWeakRef(storage)


@cache
def _of(function: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether an operation does no work, and which of its arguments it writes."""
    schema = function._schema
    written = tuple(
        i
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    looks_on = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return schema.name in WITHOUT_WORK or (looks_on and not written), written


def _tensors(values: list[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(list(value))


def _range(tensor: torch.Tensor) -> Range:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return 0, 0
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _overlap(span: Range, address: int, size: int) -> bool:
    return span[0] < address + size and address < span[1]
