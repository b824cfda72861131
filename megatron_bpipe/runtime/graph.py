"""Reading what autograd saved for one micro-batch, from its finished graph.

Nothing is hooked while the forward runs: micro-batches that stay cost nothing. The graph of one
that leaves is walked from the stage's output, and each node's slots are read
(`torch_internals.read_slots`).

    Kept.PARAMETER   a Parameter, or any storage of one (a transposed weight)
    Kept.INPUT       a leaf that requires grad and that others hold: the stage's input
    Kept.SPECIAL     not one block of plain bytes: subclass, sparse, nested, quantised, conjugated
    Kept.HOOKED      the slot has somebody's hooks (a non-reentrant checkpoint, offloading): it is
                     not read, since that would run them
    Kept.CHANGED     changed in place since it was saved: autograd refuses to give it out
    Kept.SHARED      somebody outside this graph holds the storage too: masks, rotary tables,
                     buffers, pipeline buffers
    None             as far as counting from outside can tell, this graph alone holds it
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from megatron_bpipe.runtime.torch_internals import (
    COUNTS_TENSORS,
    Node,
    Slot,
    base_of,
    is_parameter,
    is_plain,
    read_slots,
    references_of_unshared,
    sequence_of,
    storage_holders,
    storage_id,
    storage_of,
    tensor_id,
    tensor_references,
)


class Kept(enum.Enum):
    """Why a saved tensor's storage stays where it is."""

    PARAMETER = "parameter"
    INPUT = "stage input"
    SPECIAL = "not plain bytes"
    HOOKED = "has hooks of its own"
    CHANGED = "changed in place"
    SHARED = "held elsewhere too"


class Saved(NamedTuple):
    """One saved tensor.

    Attributes:
        slot: takes hooks, once.
        tensor: as autograd would unpack it; None where somebody's hook made something else of it.
        node: that saved it.
        kept: why it must stay, from what it is alone.
        original: autograd holds this very tensor, not an alias of its own; only if asked for.
        sequence: autograd's number of the node, the later in the forward the higher.
    """

    slot: Slot
    tensor: torch.Tensor | None
    node: str
    kept: Kept | None
    original: bool = False
    sequence: int = 0


@dataclass
class SavedStorage:
    """One storage and all tensors the graph saved in it."""

    storage: torch.UntypedStorage
    device: torch.device
    node: str  # the first that saved it
    shape: tuple[int, ...]
    dtype: torch.dtype
    slots: int = 0
    kept: Kept | None = None
    sequence: int = 0  # the highest of the nodes that saved it
    _aliases: int = 0
    _bases: set[int] = field(default_factory=set)
    _originals: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor, *, original: bool) -> None:
        """Account for one more slot."""
        self.slots += 1
        if not original:
            self._aliases += 1  # each such slot has an alias of its own
            return
        self._originals.setdefault(tensor_id(tensor), []).append(tensor)
        base = base_of(tensor)
        if base is not None:  # a view keeps the tensor it was made from
            self._bases.add(tensor_id(base))

    def held_elsewhere(self) -> bool:
        """Whether someone outside this graph holds the storage; forgets the tensors."""
        originals, self._originals = self._originals, {}
        holders = self._aliases + len(originals.keys() | self._bases)
        known = holders + 1  # and self.storage
        if storage_holders(self.storage) != known:
            return True
        # ... or holds one of the very tensors that were saved, in C++ or in Python
        return any(is_held_elsewhere(same) for same in originals.values())


@dataclass
class SavedGraph:
    """What one graph saved: its storages, and how many slots hold what somebody's hooks made."""

    storages: list[SavedStorage]
    unread_slots: int


def roots_of(output: object) -> list[Node]:
    """Graph roots of a stage's output, a tensor or a list of tensors."""
    return [t.grad_fn for t in tensors_of(output) if t.grad_fn is not None]


def tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors of a stage's output, which is one or a list of them."""
    parts = output if isinstance(output, (list, tuple)) else [output]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def saved_graph(roots: Sequence[Node], parameters: Collection[int] = ()) -> SavedGraph:
    """Every storage saved below ``roots``, and why it must stay, if it must.

    A storage without memory behind it counts for nothing and is not among them.

    Args:
        roots: see `roots_of`.
        parameters: `storage_id` of storages that belong to the model; only refines `Kept`, since
            the model's own references already keep them.
    """
    found: dict[int, SavedStorage] = {}
    unread = 0
    for saved in saved_tensors(roots, originals=True):
        unread += saved.tensor is None
        for part in _parts(saved):
            storage = storage_of(part)
            if storage is None:
                continue
            entry = found.get(storage_id(storage))
            if entry is None:
                shape = tuple(part.shape) if not part.is_nested else ()
                entry = SavedStorage(storage, part.device, saved.node, shape, part.dtype)
                found[storage_id(storage)] = entry
            entry.add(part, original=saved.original)
            entry.kept = entry.kept or saved.kept
            entry.sequence = max(entry.sequence, saved.sequence)
    saved = part = storage = None  # type: ignore[assignment]  # they would count as holders
    for key, entry in found.items():
        if entry.kept is None and key in parameters:
            entry.kept = Kept.PARAMETER
        elsewhere = entry.held_elsewhere()
        if entry.kept is Kept.INPUT and not elsewhere and COUNTS_TENSORS:
            entry.kept = None  # a checkpoint's own input
        if elsewhere and entry.kept is None:
            entry.kept = Kept.SHARED
    return SavedGraph(list(found.values()), unread)


def saved_storages(roots: Sequence[Node], parameters: Collection[int] = ()) -> list[SavedStorage]:
    """The storages of `saved_graph`."""
    return saved_graph(roots, parameters).storages


def nodes_below(roots: Sequence[Node]) -> Iterator[Node]:
    """Every node of the graph below ``roots``, these included, once, in a fixed order."""
    seen = set(roots)
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        yield node
        for below, _ in reversed(node.next_functions):
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)


def saved_tensors(
    roots: Sequence[Node], *, originals: bool = False, until: int | None = None
) -> Iterator[Saved]:
    """Every tensor saved below ``roots``, each slot once, in a fixed order.

    With ``until`` only by nodes up to that sequence number; later ones are not read.
    """
    for node in nodes_below(roots):
        number = sequence_of(node)
        if until is not None and number > until:
            continue
        name = node.name()
        for reading in read_slots(node, originals=originals):
            slot, value, hooked, changed, original = reading
            if hooked or changed:
                tensor = value if isinstance(value, torch.Tensor) else None
                kept = Kept.HOOKED if hooked else Kept.CHANGED
                yield Saved(slot, tensor, name, kept, sequence=number)
            elif isinstance(value, torch.Tensor):
                yield Saved(slot, value, name, why_kept(value), original, number)


def why_kept(tensor: torch.Tensor) -> Kept | None:
    """Why this tensor must stay, from what it is alone (see `Kept`)."""
    if is_parameter(tensor):
        return Kept.PARAMETER
    if not is_plain(tensor):
        return Kept.SPECIAL
    if tensor.is_leaf and tensor.requires_grad:
        return Kept.INPUT
    return None


def is_held_elsewhere(same: list[torch.Tensor]) -> bool:
    """Whether others hold a tensor that a graph saved in ``len(same)`` slots; empties ``same``.

    Nobody else in the program may refer to it while this counts.
    """
    slots, tensor = len(same), same.pop()
    same.clear()
    in_c, in_python = tensor_references(tensor)
    return in_c > slots + 1 or in_python > references_of_unshared()


def memory_of(saved: Saved) -> Iterator[torch.UntypedStorage]:
    """The storages whose memory a saved tensor takes: several for sparse tensors and wrappers."""
    for part in _parts(saved):
        storage = storage_of(part)
        if storage is not None:
            yield storage


def _parts(saved: Saved) -> Iterator[torch.Tensor]:
    """The tensors whose storages hold what was saved."""
    if saved.tensor is None:
        return
    if saved.kept is None:
        yield saved.tensor
    else:
        yield from _inner(saved.tensor)


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _inner(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor
