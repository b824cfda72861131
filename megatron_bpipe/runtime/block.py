"""The bytes that saved tensors cover, storage by storage, and where they come back to.

Views of one storage share one `Block`, and are rebuilt with their exact offset, shape and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch

from megatron_bpipe.runtime.torch_internals import version

# A multiple of every dtype's size, and what allocators and copy engines like.
ALIGNMENT = 512
# What torch's caching allocator takes from its pool of small blocks. Smaller storages come back
# together; each larger one by itself, since it then fits what the last eviction has freed.
TOGETHER = 2**20


def padded(size: int) -> int:
    """``size`` rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class IllegalMoveError(RuntimeError):
    """An op asked for a move that the activation's state does not allow."""


class ModifiedInPlaceError(RuntimeError):
    """A saved tensor was changed between the forward and the backward that needs it."""


@dataclass(slots=True, weakref_slot=True)
class Block:
    """The bytes of one storage that saved tensors cover: ``[low, high)`` of ``nbytes``."""

    storage: torch.UntypedStorage | None
    device: torch.device
    low: int
    high: int
    shift: int = 0  # bytes cut off in front when the block came back smaller than it left
    nbytes: int = 0  # of a storage that is emptied in place
    fetch: Callable[[], None] | None = None  # brings it back, while it is away

    def bytes_view(self) -> torch.Tensor:
        """The covered bytes as a flat uint8 tensor on the block's storage."""
        assert self.storage is not None
        return _view(self.storage, torch.uint8, self.device, self.low, (self.size,), (1,))

    @property
    def size(self) -> int:
        """Covered bytes."""
        return self.high - self.low

    @property
    def is_here(self) -> bool:
        """Whether the bytes are in local memory."""
        return self.storage is not None and not (self.nbytes and self.storage.nbytes() == 0)

    def cover(self, tensor: torch.Tensor) -> None:
        """Cover what ``tensor`` can touch, too."""
        low, high = extent(tensor)
        self.low, self.high = min(self.low, low), max(self.high, high)


@dataclass(slots=True)
class View:
    """One saved tensor: its place in a block."""

    block: Block
    dtype: torch.dtype
    offset: int  # elements
    shape: torch.Size
    stride: tuple[int, ...]
    node: str
    alias: torch.Tensor | None = None  # of a storage that stays: shows whether it was changed
    version: int = 0

    @property
    def is_changed(self) -> bool:
        """Whether it was changed in place since it was captured."""
        return self.alias is not None and version(self.alias) != self.version


class Layout(NamedTuple):
    """Where blocks come back to.

    Attributes:
        places: for each block its buffer (-1: it is emptied and filled in place), and its new
            `low`, `high` and `shift`.
        sizes: of the buffers, in bytes.
        cuts: how each buffer is cut: bytes before its first block, bytes of that block, bytes
            before the second, ...
    """

    places: list[tuple[ReferenceType[Block], int, int, int, int]]
    sizes: list[int]
    cuts: list[list[int]]


def lay_out(blocks: Sequence[Block]) -> Layout:
    """Small blocks share buffers; a buffer is a sixteenth of them all at most."""
    together = min(TOGETHER, sum(block.size for block in blocks) // 16)
    layout = Layout([], [], [])
    shared = -1
    used = end = 0  # of the shared buffer, with and without padding
    for block in blocks:
        if block.nbytes:
            layout.places.append((ref(block), -1, block.low, block.high, block.shift))
            continue
        length = block.size
        at = block.low % ALIGNMENT  # as it lay, for kernels that look at addresses
        size = padded(at + length)
        if size > together:
            index, low = len(layout.cuts), at
            layout.cuts.append([at, length])
        else:
            if shared < 0 or used + size > together:
                shared, used, end = len(layout.cuts), 0, 0
                layout.cuts.append([])
            index, low = shared, used + at
            layout.cuts[shared] += [low - end, length]
            used, end = used + size, low + length
        layout.places.append((ref(block), index, low, low + length, block.shift + block.low - low))
    layout.sizes.extend(map(sum, layout.cuts))
    return layout


def unpack(view: View) -> torch.Tensor:
    """The saved tensor, on the memory where its block is now; waits for one on its way back.

    Raises:
        IllegalMoveError: it is not in local memory.
        ModifiedInPlaceError: it stayed, and was changed since it was captured.
    """
    block = view.block
    if block.fetch is not None:
        block.fetch()
    if not block.is_here:
        raise IllegalMoveError(
            f"the backward asked for a tensor saved by {view.node} that is not in local memory"
        )
    if view.alias is not None and view.is_changed:
        raise ModifiedInPlaceError(
            f"a tensor of shape {tuple(view.shape)} saved by {view.node} was changed in place "
            f"(version {version(view.alias)}, saved at {view.version}): its gradient would be "
            "silently wrong; change the model to write to a copy"
        )
    assert block.storage is not None
    offset = view.offset - block.shift // view.dtype.itemsize
    return _view(block.storage, view.dtype, block.device, offset, view.shape, view.stride)


def view_of(tensor: torch.Tensor, block: Block, node: str) -> View:
    """``tensor``'s place in ``block``."""
    return View(
        block=block,
        dtype=tensor.dtype,
        offset=int(tensor.storage_offset()),
        shape=tensor.shape,
        stride=tensor.stride(),
        node=node,
    )


def _view(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    device: torch.device,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, stride)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last byte of its storage that ``tensor`` can touch; it is not empty."""
    first = int(tensor.storage_offset()) * tensor.itemsize
    if tensor.is_contiguous():
        return first, first + tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + (1 + sum((n - 1) * step for n, step in steps)) * tensor.itemsize
