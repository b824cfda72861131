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
earliest layers first, without knowing what a layer is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from megatron_bpipe.runtime.block import Block, View, extent, unpack, view_of
from megatron_bpipe.runtime.graph import Kept, saved_tensors
from megatron_bpipe.runtime.part import Holders, Part, State
from megatron_bpipe.runtime.torch_internals import Node, storage_id, storage_of, tensor_id, version
from megatron_bpipe.schedule.ops import ActivationKey, PartKey


@dataclass(slots=True)
class Activation:
    """The record of one micro-batch on the evictor."""

    key: ActivationKey
    roots: list[Node]
    device: torch.device  # that computes; what was saved elsewhere stays there
    parts: list[Part] = field(default_factory=list)

    def capture(self, count: int = 1, leaving: Collection[int] = (0,)) -> None:
        """Put hooks on the finished graph, and choose what leaves of what nobody else holds.

        Slots of Parameters, of the stage's input and of what is not plain bytes are left as
        autograd made them, as are those that have hooks already.

        Args:
            count: parts.
            leaving: those of them that will leave.
        """
        name = PartKey if count > 1 else (lambda key, part: PartKey(key))
        self.parts = [Part(name(self.key, part), self.device) for part in range(count)]
        undecided: list[Holders] = []
        chosen: list[Holders] = []
        for holders in self._hooked():
            in_place = bool(holders.as_they_are)
            if holders.are_all():
                chosen.append(holders)
            elif not in_place:
                undecided.append(holders)
        self._cut(chosen, undecided)
        for part in leaving:
            self.parts[part].prepare()

    def _cut(self, chosen: list[Holders], undecided: list[Holders]) -> None:
        if len(self.parts) == 1:
            for holders in chosen:
                self.parts[0].add(holders)
        else:
            # no hook waits for what is emptied in place: it is back before the backward begins
            ordered = sorted(chosen, key=lambda one: (bool(one.block.nbytes), one.sequence))
            sizes = [holders.block.size for holders in ordered]
            for holders, part in zip(ordered, cut(sizes, len(self.parts)), strict=True):
                self.parts[-1 if holders.block.nbytes else part].add(holders)
        for holders in undecided:
            self._part_at(holders.sequence, chosen).add_undecided(holders)

    def _part_at(self, sequence: int, chosen: Sequence[Holders]) -> Part:
        """The part to which a block belongs that is needed at this node."""
        if len(self.parts) == 1:
            return self.parts[0]
        sizes = sorted((one.sequence, one.block.size) for one in chosen)
        before = sum(size for at, size in sizes if at < sequence)
        total = sum(size for _, size in sizes)
        return self.parts[min(len(self.parts) - 1, before * len(self.parts) // max(1, total))]

    def _hooked(self) -> Iterable[Holders]:
        """Put hooks on every slot that may leave; all that is known of each block."""
        found: dict[int, Holders] = {}
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
