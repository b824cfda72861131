"""One micro-batch's activations: what was captured, and the state it is in.

    RESIDENT -> EVICTING -> REMOTE -> LOADING -> RESIDENT -> CONSUMED

Autograd's saved tensors are recorded by storage: views of one storage share one `Block`, and are
rebuilt with their exact offset, shape and strides. A storage leaves only if nobody but this record
holds it (its use count says so); all others stay where they are, which is what keeps parameters,
buffers, rotary tables, masks and pipeline buffers safe without naming them.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch

from megatron_bpipe.runtime.graph import Node, saved_tensors, why_kept
from megatron_bpipe.schedule.ops import ActivationKey

# A multiple of every dtype's size, and what allocators and copy engines like.
ALIGNMENT = 512


def padded(size: int) -> int:
    """``size`` rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class State(enum.Enum):
    """Where a micro-batch's activations are."""

    RESIDENT = "resident"
    EVICTING = "evicting"
    REMOTE = "remote"
    LOADING = "loading"
    CONSUMED = "consumed"


LEGAL_MOVES: dict[State, tuple[State, ...]] = {
    State.RESIDENT: (State.EVICTING, State.CONSUMED),
    State.EVICTING: (State.REMOTE,),
    State.REMOTE: (State.LOADING,),
    State.LOADING: (State.RESIDENT,),
    State.CONSUMED: (),
}


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

    def bytes_view(self) -> torch.Tensor:
        """The covered bytes as a flat uint8 tensor on the block's storage."""
        assert self.storage is not None
        return _view(self.storage, torch.uint8, self.device, self.low, (self.size,), (1,))

    @property
    def size(self) -> int:
        """Covered bytes."""
        return self.high - self.low


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


@dataclass(slots=True)
class Activation:
    """The record of one micro-batch on the evictor."""

    key: ActivationKey
    roots: list[Node]
    device: torch.device  # that computes; what was saved elsewhere stays there
    state: State = State.RESIDENT
    _views: list[View] = field(default_factory=list)
    # weak: the graph holds them, through its hooks, and lets each go as the backward passes it
    _leaving: list[ReferenceType[Block]] | None = None  # None until chosen

    def move(self, to: State) -> None:
        """Change state.

        Raises:
            IllegalMoveError: the move is not in `LEGAL_MOVES`.
        """
        if to not in LEGAL_MOVES[self.state]:
            legal = " or ".join(s.value for s in LEGAL_MOVES[self.state]) or "nothing"
            raise IllegalMoveError(
                f"micro-batch {self.key} is {self.state.value} and can only become {legal}, "
                f"not {to.value}"
            )
        self.state = to

    @property
    def leaving(self) -> list[Block]:
        """What leaves when this micro-batch is evicted; chosen once."""
        if self._leaving is None:
            self._leaving = [ref(block) for block in self._choose()]
        return [block for one in self._leaving if (block := one()) is not None]

    def capture(self) -> None:
        """Put hooks on the finished graph.

        Slots of Parameters and of the stage's input are left as autograd made them.
        """
        blocks: dict[int, Block] = {}
        views = self._views
        hooked = ""  # the node whose slot gets its hooks

        def pack(tensor: torch.Tensor) -> View:
            storage = tensor.untyped_storage()
            low, high = _extent(tensor)
            block = blocks.get(storage._cdata)
            if block is None:
                block = blocks[storage._cdata] = Block(storage, tensor.device, low, high)
            elif block.high == block.low:
                block.low, block.high = low, high
            elif high > low:
                block.low, block.high = min(block.low, low), max(block.high, high)
            offset = int(tensor.storage_offset())
            views.append(View(block, tensor.dtype, offset, tensor.shape, tensor.stride(), hooked))
            return views[-1]

        for saved in saved_tensors(self.roots):
            if why_kept(saved.tensor) is None:
                hooked, alias = saved.node, saved.tensor.detach()
                saved.slot.register_hooks(pack, _unpack)  # calls pack at once
                views[-1].alias, views[-1].version = alias, alias._version
        blocks.clear()  # autograd keeps pack, and with it what it refers to

    def _choose(self) -> list[Block]:
        """Decide, storage by storage, what leaves of what was captured.

        Raises:
            ModifiedInPlaceError: something was changed since it was captured.
        """
        views = list(self._views)
        self._views.clear()  # pack refers to it
        for view in views:
            _check_unchanged(view)
        blocks = {id(view.block): view.block for view in views}
        # The hooks hold views, views hold blocks and aliases, and a storage with one more
        # holder than these is somebody else's too: dropping it would free nothing.
        ours = Counter(id(view.block) for view in views)
        chosen = [
            block
            for block in blocks.values()
            if block.size
            and block.device == self.device
            and torch._C._storage_Use_Count(_address(block)) == 1 + ours[id(block)]
        ]
        leaving = {id(block) for block in chosen}
        for view in views:
            if id(view.block) in leaving:
                view.alias = None  # nobody else can write to it any more
        return chosen

    def forget(self) -> None:
        """Drop every reference once the backward has used it."""
        self.roots = []
        self._views.clear()
        self._leaving = []


def drop(blocks: Sequence[Block]) -> None:
    """Free the local copies."""
    for block in blocks:
        block.storage = None


def allocate(blocks: Sequence[Block]) -> list[torch.UntypedStorage]:
    """Fresh local memory for ``blocks``, on the current stream's allocator; returns the storages.

    Only the covered bytes come back, so a saved slice of a big storage comes back small.
    """
    fresh = []
    for block in blocks:
        low = block.low - block.low % ALIGNMENT
        storage = torch.UntypedStorage(block.high - low, device=block.device)
        block.low, block.high, block.shift = block.low - low, block.high - low, block.shift + low
        block.storage = storage
        fresh.append(storage)
    return fresh


def _address(block: Block) -> int:
    assert block.storage is not None
    return block.storage._cdata


def _unpack(view: View) -> torch.Tensor:
    block = view.block
    if block.storage is None:
        raise IllegalMoveError(
            f"the backward asked for a tensor saved by {view.node} that is not in local memory"
        )
    _check_unchanged(view)
    offset = view.offset - block.shift // view.dtype.itemsize
    return _view(block.storage, view.dtype, block.device, offset, view.shape, view.stride)


def _check_unchanged(view: View) -> None:
    if view.alias is not None and view.alias._version != view.version:
        raise ModifiedInPlaceError(
            f"a tensor of shape {tuple(view.shape)} saved by {view.node} was changed in place "
            f"(version {view.alias._version}, saved at {view.version}): its gradient would be "
            "silently wrong; change the model to write to a copy"
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


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last byte of its storage that ``tensor`` can touch."""
    if tensor.numel() == 0:
        return 0, 0
    first = int(tensor.storage_offset())
    last = first + sum(
        int(n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return first * tensor.itemsize, (last + 1) * tensor.itemsize
