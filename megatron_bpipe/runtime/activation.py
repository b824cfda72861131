"""One micro-batch's activations: what was captured, and the state it is in.

    RESIDENT -> EVICTING -> REMOTE -> LOADING -> RESIDENT -> CONSUMED

Autograd's saved tensors are recorded by storage: views of one storage share one `Block`, and are
rebuilt with their exact offset, shape and strides. A storage leaves only if nobody but this record
holds it (its use count says so); all others stay where they are, which is what keeps parameters,
buffers, rotary tables, masks and pipeline buffers safe without naming them.

Some tensors must come back as the very same, which hooks cannot do: a leaf that a checkpoint made
for itself and saved (Megatron's `CheckpointWithoutOutput`), since its gradient is read from it; a
tensor on which Python code has put attributes. They get no hooks: their storage is emptied in place
and filled again, if the graph alone holds the tensor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch

from megatron_bpipe.runtime.block import (
    Block,
    IllegalMoveError,
    Layout,
    View,
    extent,
    lay_out,
    unpack,
    view_of,
)
from megatron_bpipe.runtime.graph import Kept, is_held_elsewhere, saved_tensors
from megatron_bpipe.runtime.torch_internals import (
    COUNTS_TENSORS,
    Node,
    storage_holders,
    storage_id,
    storage_of,
    tensor_id,
    version,
)
from megatron_bpipe.schedule.ops import ActivationKey


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


@dataclass(slots=True)
class _Holders:
    """All that this record and its graph hold of one block; more are somebody else's."""

    block: Block
    views: list[View] = field(default_factory=list)
    # tensors that must come back as the very same: a list of one entry a slot, by tensor
    as_they_are: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def are_all(self) -> bool:
        """Whether dropping the storage would free it; forgets the tensors."""
        same, self.as_they_are = self.as_they_are, {}
        storage = self.block.storage
        assert storage is not None
        known = 1 + len(self.views) + len(same)  # 1: the block itself
        if storage_holders(storage) != known:
            return False
        if not same:
            return True
        if not (COUNTS_TENSORS and storage.resizable()):
            return False
        if any(is_held_elsewhere(tensors) for tensors in same.values()):
            return False
        self.block.nbytes = storage.nbytes()
        return True


@dataclass(slots=True)
class Activation:
    """The record of one micro-batch on the evictor."""

    key: ActivationKey
    roots: list[Node]
    device: torch.device  # that computes; what was saved elsewhere stays there
    state: State = State.RESIDENT
    # weak: the graph holds them, through its hooks, and lets each go as the backward passes it
    _leaving: list[ReferenceType[Block]] = field(default_factory=list)
    _in_place: list[Block] = field(default_factory=list)  # no hook holds these
    _pieces: list[torch.Tensor] = field(default_factory=list)  # what leaves, until it has left
    _undecided: list[_Holders] = field(default_factory=list)
    _layout: Layout | None = None  # of what will come back

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

    def capture(self) -> None:
        """Put hooks on the finished graph, and choose what leaves of what nobody else holds.

        Slots of Parameters, of the stage's input and of what is not plain bytes are left as
        autograd made them, as are those that have hooks already.
        """
        found: dict[int, _Holders] = {}
        pending: list[View] = []  # the view that the slot about to get hooks stands for

        def pack(tensor: torch.Tensor) -> View:
            view = pending.pop()
            view.alias, view.version = tensor, version(tensor)
            return view

        for saved in saved_tensors(self.roots):
            tensor = saved.tensor
            if tensor is None or saved.kept not in (None, Kept.INPUT):
                continue
            storage = storage_of(tensor)
            if storage is None or tensor.nbytes == 0 or tensor.device != self.device:
                continue
            holders = found.get(storage_id(storage))
            if holders is None:
                block = Block(storage, tensor.device, *extent(tensor))
                holders = found[storage_id(storage)] = _Holders(block)
            else:
                holders.block.cover(tensor)
            if saved.kept is Kept.INPUT or vars(tensor):
                holders.as_they_are.setdefault(tensor_id(tensor), []).append(tensor)
                continue
            pending.append(view_of(tensor, holders.block, saved.node))
            holders.views.append(pending[-1])
            saved.slot.register_hooks(pack, unpack)  # calls pack at once
        saved = tensor = storage = None  # type: ignore[assignment]  # they would count as holders
        undecided = list(found.values())
        found.clear()
        self._choose(undecided, later=False)
        self._layout = lay_out(self.leaving)

    def choose_leaving(self) -> list[torch.Tensor]:
        """The bytes that leave now, as flat uint8 tensors.

        Most were chosen when they were captured, beside a GPU's computation. Now is the time of
        those that others still held then, the stage's output above all.
        """
        undecided, self._undecided = self._undecided, []
        if not self._pieces:  # it leaves a second time
            self._pieces = [block.bytes_view() for block in self.leaving]
        known = len(self._leaving)
        self._choose(undecided, later=True)
        self._undecided.clear()
        if len(self._leaving) > known:
            self._layout = None
        return self._pieces

    @property
    def leaving(self) -> list[Block]:
        """The blocks chosen to leave that the backward still needs."""
        return [block for one in self._leaving if (block := one()) is not None]

    def _choose(self, undecided: list[_Holders], *, later: bool) -> None:
        for holders in undecided:
            in_place = bool(holders.as_they_are)
            if not holders.are_all():
                if not in_place:
                    self._undecided.append(holders)
                continue
            if later and any(view.is_changed for view in holders.views):
                continue
            block = holders.block
            for view in holders.views:
                view.alias = None  # nobody else can write to it any more
            if in_place:
                self._in_place.append(block)
            self._leaving.append(ref(block))
            self._pieces.append(block.bytes_view())

    def drop(self) -> None:
        """Free the local copies."""
        self._pieces.clear()
        for block in self.leaving:
            if block.nbytes:
                assert block.storage is not None
                block.storage.resize_(0)
            else:
                block.storage = None

    def allocate(self) -> tuple[list[torch.Tensor], list[torch.UntypedStorage]]:
        """Fresh local memory for what left, on the current stream's allocator.

        Only the covered bytes come back, so a saved slice of a big storage comes back small.

        Returns:
            The bytes to fill, flat, in the order in which they left; and the storages.
        """
        layout = self._layout or lay_out(self.leaving)
        self._layout = None  # the blocks lie elsewhere from here on
        buffers = [torch.empty(n, dtype=torch.uint8, device=self.device) for n in layout.sizes]
        storages = [buffer.untyped_storage() for buffer in buffers]
        cuts = zip(buffers, layout.cuts, strict=True)
        parts = [iter(buffer.split(cut)[1::2]) for buffer, cut in cuts]
        pieces = []
        for reference, index, low, high, shift in layout.places:
            block = reference()
            assert block is not None  # the graph, or _in_place, holds it
            if index < 0:
                assert block.storage is not None
                block.storage.resize_(block.nbytes)
                pieces.append(block.bytes_view())
                continue
            block.storage = storages[index]
            block.low, block.high, block.shift = low, high, shift
            pieces.append(next(parts[index]))
        return pieces, storages

    def arrived(self) -> None:
        """The load is over: from here on the graph alone decides how long each tensor lives."""
        self._in_place.clear()

    def forget(self) -> None:
        """Drop every reference once the backward has used it."""
        self.roots, self._layout = [], None
        for references in (self._leaving, self._in_place, self._pieces, self._undecided):
            references.clear()
