"""One part of an activation: blocks that leave and return together, and the state they are in.

    RESIDENT -> EVICTING -> REMOTE -> LOADING -> RESIDENT -> CONSUMED

An activation that travels whole is one part.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch

from megatron_bpipe.runtime.block import Block, IllegalMoveError, Layout, View, lay_out
from megatron_bpipe.runtime.graph import is_held_elsewhere
from megatron_bpipe.runtime.torch_internals import COUNTS_TENSORS, storage_holders
from megatron_bpipe.schedule.ops import PartKey


class State(enum.Enum):
    """Where a part of a micro-batch's activations is."""

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
class Holders:
    """All that this record and its graph hold of one block; more are somebody else's.

    ``sequence`` is the highest number of the nodes that saved the block: a backward goes from high
    numbers to low ones, so it is needed when that node is reached.
    """

    block: Block
    views: list[View] = field(default_factory=list)
    # tensors that must come back as the very same: a list of one entry a slot, by tensor
    as_they_are: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    sequence: int = 0

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
class Part:
    """The record of one part of a micro-batch on the evictor."""

    key: PartKey
    device: torch.device
    state: State = State.RESIDENT
    # weak: the graph holds them, through its hooks, and lets each go as the backward passes it
    _leaving: list[ReferenceType[Block]] = field(default_factory=list)
    _in_place: list[Block] = field(default_factory=list)  # no hook holds these
    _pieces: list[torch.Tensor] = field(default_factory=list)  # what leaves, until it has left
    _undecided: list[Holders] = field(default_factory=list)
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

    def add(self, holders: Holders) -> None:
        """A block that nobody else holds: it will leave."""
        block = holders.block
        for view in holders.views:
            view.alias = None  # nobody else can write to it any more
        if block.nbytes:
            self._in_place.append(block)
        self._leaving.append(ref(block))

    def add_undecided(self, holders: Holders) -> None:
        """A block that others still hold; who does is asked again when the part leaves."""
        self._undecided.append(holders)

    def prepare(self) -> None:
        """Do now, beside a GPU's computation, what leaving and returning needs of the host."""
        self._pieces = [block.bytes_view() for block in self.leaving]
        self._layout = lay_out(self.leaving)

    def choose_leaving(self) -> list[torch.Tensor]:
        """The bytes that leave now, as flat uint8 tensors.

        Most were chosen when they were captured, beside a GPU's computation. Now is the time of
        those that others still held then, the stage's output above all.
        """
        undecided, self._undecided = self._undecided, []
        if not self._pieces:  # it leaves a second time
            self._pieces = [block.bytes_view() for block in self.leaving]
        for holders in undecided:
            if not holders.are_all() or any(view.is_changed for view in holders.views):
                continue
            self.add(holders)
            self._pieces.append(holders.block.bytes_view())
            self._layout = None
        return self._pieces

    @property
    def leaving(self) -> list[Block]:
        """The blocks chosen to leave that the backward still needs."""
        return [block for one in self._leaving if (block := one()) is not None]

    def drop(self, fetch: Callable[[], None]) -> None:
        """Free the local copies; who needs one before it is back calls ``fetch``."""
        self._pieces.clear()
        for block in self.leaving:
            block.fetch = fetch
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
        for block in self.leaving:
            block.fetch = None
        self._in_place.clear()

    def forget(self) -> None:
        """Drop every reference once the backward has used it."""
        self._layout = None
        for references in (self._leaving, self._in_place, self._pieces, self._undecided):
            references.clear()
