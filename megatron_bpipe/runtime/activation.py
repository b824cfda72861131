"""One micro-batch's activations: what was captured, cut into the parts that travel.

Autograd's saved tensors are recorded by storage: views of one storage share one `Block`, and are
rebuilt with their exact offset, shape and strides. A storage leaves only if nobody but this record
holds it (its use count says so); all others stay where they are, which is what keeps parameters,
buffers, rotary tables, masks and pipeline buffers safe without naming them.

Some tensors must come back as the very same, which hooks cannot do: a leaf that a checkpoint made
for itself and saved (Megatron's `CheckpointWithoutOutput`), since its gradient is read from it; a
tensor on which Python code has put attributes. They get no hooks: their storage is emptied in place
and filled again, if the graph alone holds the tensor.

A backward asks for what it saved in falling order of autograd's sequence numbers, so blocks in
rising order are in the order in which they are needed last. Cut by bytes that gives parts, the
earliest layers first, without knowing what a layer is. The first forward of a chunk is cut by its
bytes, all later ones at the same nodes.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from megatron_bpipe.runtime.block import Block, View, extent, unpack, view_of
from megatron_bpipe.runtime.graph import Kept, saved_tensors
from megatron_bpipe.runtime.part import Holders, Part, State
from megatron_bpipe.runtime.torch_internals import (
    Node,
    sequence_of,
    storage_id,
    storage_of,
    tensor_id,
    version,
)
from megatron_bpipe.schedule.ops import ActivationKey, PartKey


@dataclass(slots=True)
class Activation:
    """The record of one micro-batch on the evictor."""

    key: ActivationKey
    roots: list[Node]
    device: torch.device  # that computes; what was saved elsewhere stays there
    parts: list[Part] = field(default_factory=list)

    def capture(self, back: Sequence[int] = (0,), leaving: Collection[int] = (0,)) -> None:
        """Put hooks on the finished graph, and choose what leaves of what nobody else holds.

        Slots of Parameters, of the stage's input and of what is not plain bytes are left as
        autograd made them, as are those that have hooks already, and those of nodes that are later
        than any part that will leave.

        Args:
            back: how far before the graph's end each part's last node is, in sequence numbers.
            leaving: the parts that will leave.
        """
        count, top = len(back), max(map(sequence_of, self.roots), default=0)
        names = range(count) if count > 1 else (None,)
        self.parts = [Part(PartKey(self.key, name), self.device) for name in names]
        ends = [top - far for far in back[:-1]]  # the last part has the rest
        last = max(leaving)
        for holders in self._hooked(ends[last] if last < count - 1 else None):
            in_place = bool(holders.as_they_are)
            # no hook waits for what is emptied in place: it is back before the backward begins
            part = count - 1 if in_place else bisect.bisect_left(ends, holders.sequence)
            if holders.are_all():
                self.parts[part].add(holders)
            elif not in_place:
                self.parts[part].add_undecided(holders)
        for part in leaving:
            self.parts[part].prepare()

    def _hooked(self, until: int | None) -> list[Holders]:
        """Put hooks on every slot that may leave; all that is known of each block.

        ``until``: look at nodes up to this sequence number only. A block that later ones have saved
        too then has more holders than are known here, and stays.
        """
        found: dict[int, Holders] = {}
        pending: list[View] = []  # the view that the slot about to get hooks stands for

        def pack(tensor: torch.Tensor) -> View:
            view = pending.pop()
            view.alias, view.version = tensor, version(tensor)
            return view

        for saved in saved_tensors(self.roots, until=until):
            tensor = saved.tensor
            if tensor is None or saved.kept not in (None, Kept.INPUT):
                continue
            storage = storage_of(tensor)
            if storage is None or tensor.nbytes == 0 or tensor.device != self.device:
                continue
            holders = found.get(storage_id(storage))
            if holders is None:
                block = Block(storage, tensor.device, *extent(tensor))
                holders = found[storage_id(storage)] = Holders(block)
            else:
                holders.block.cover(tensor)
            holders.sequence = max(holders.sequence, saved.sequence)
            if saved.kept is Kept.INPUT or vars(tensor):
                holders.as_they_are.setdefault(tensor_id(tensor), []).append(tensor)
                continue
            pending.append(view_of(tensor, holders.block, saved.node))
            holders.views.append(pending[-1])
            saved.slot.register_hooks(pack, unpack)  # calls pack at once
        saved = tensor = storage = None  # type: ignore[assignment]  # they would count as holders
        return list(found.values())

    @property
    def leaving(self) -> list[Block]:
        """The blocks chosen to leave that the backward still needs."""
        return [block for part in self.parts for block in part.leaving]

    def consume(self) -> None:
        """The backward has used it: drop every reference."""
        self.roots = []
        for part in self.parts:
            part.move(State.CONSUMED)
            part.forget()


def cut(sizes: Sequence[int], count: int) -> list[int]:
    """To which of ``count`` parts each block belongs, from their bytes in order.

    The first k parts together have at least k of ``count`` equal shares, and less than one block
    more: so what stays of an activation is never more than the schedule counts.
    """
    total, before = sum(sizes), 0
    parts = []
    for size in sizes:
        parts.append(min(count - 1, before * count // max(1, total)))
        before += size
    return parts
