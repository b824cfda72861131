"""Reading what autograd saved for one micro-batch, from its finished graph.

Nothing is hooked while the forward runs: micro-batches that stay cost nothing. The graph of one
that leaves is walked from the stage's output, and each node's ``_raw_saved_*`` slots are read.

    Kept.PARAMETER   a Parameter, or any storage of one (a transposed weight)
    Kept.INPUT       a leaf that requires grad: the stage's input, held until its backward
    Kept.SPECIAL     not one block of plain bytes: subclass, sparse, quantised, conjugated
    Kept.SHARED      somebody outside this graph holds the storage too: masks, rotary tables,
                     buffers, pipeline buffers
    None             as far as counting from outside can tell, this graph alone holds it
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

# autograd's node and slot classes have no public Python type
Node = Any
Slot = Any


class Kept(enum.Enum):
    """Why a saved tensor's storage stays where it is."""

    PARAMETER = "parameter"
    INPUT = "stage input"
    SPECIAL = "not plain bytes"
    SHARED = "held elsewhere too"


class Saved(NamedTuple):
    """One saved tensor: the slot that takes hooks, and the tensor as autograd would unpack it."""

    slot: Slot
    tensor: torch.Tensor
    node: str
    original: bool  # autograd holds this very tensor, not an alias of its own


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
    _aliases: int = 0
    _bases: set[int] = field(default_factory=set)
    _originals: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, saved: Saved) -> None:
        """Account for one more slot."""
        self.slots += 1
        if not saved.original:
            self._aliases += 1  # each such slot has an alias of its own
            return
        self._originals.setdefault(saved.tensor._cdata, []).append(saved.tensor)
        if saved.tensor._base is not None:  # a view keeps the tensor it was made from
            self._bases.add(saved.tensor._base._cdata)

    def held_elsewhere(self) -> bool:
        """Whether someone outside this graph holds the storage; forgets the tensors."""
        originals, self._originals = self._originals, {}
        holders = self._aliases + len(originals.keys() | self._bases)
        known = holders + 1  # and self.storage
        if torch._C._storage_Use_Count(self.storage._cdata) != known:
            return True
        # ... or holds one of the very tensors that were saved, in C++ or in Python
        return any(_tensor_is_shared(same) for same in originals.values())


def roots_of(output: object) -> list[Node]:
    """Graph roots of a stage's output, a tensor or a list of tensors."""
    return [t.grad_fn for t in tensors_of(output) if t.grad_fn is not None]


def tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors of a stage's output, which is one or a list of them."""
    parts = output if isinstance(output, (list, tuple)) else [output]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def saved_storages(roots: Sequence[Node], parameters: Collection[int] = ()) -> list[SavedStorage]:
    """Every storage saved below ``roots``, and why it must stay, if it must.

    Args:
        roots: see `roots_of`.
        parameters: ``_cdata`` of storages that belong to the model; only refines `Kept`, since
            the model's own references already keep them.

    Raises:
        RuntimeError: by autograd, where a saved tensor has been changed in place: reading a slot
            runs the version check that hooks would otherwise switch off.
    """
    found: dict[int, SavedStorage] = {}
    for saved in saved_tensors(roots):
        storage = saved.tensor.untyped_storage()
        entry = found.get(storage._cdata)
        if entry is None:
            tensor = saved.tensor
            shape = tuple(tensor.shape)
            entry = SavedStorage(storage, tensor.device, saved.node, shape, tensor.dtype)
            found[storage._cdata] = entry
        entry.add(saved)
        entry.kept = entry.kept or why_kept(saved.tensor)
    saved = storage = tensor = None  # type: ignore[assignment]  # they would count as holders
    for key, entry in found.items():
        if entry.kept is None and key in parameters:
            entry.kept = Kept.PARAMETER
        if entry.held_elsewhere() and entry.kept is None:
            entry.kept = Kept.SHARED
    return list(found.values())


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


def saved_tensors(roots: Sequence[Node]) -> Iterator[Saved]:
    """Every tensor saved below ``roots``, each slot once, in a fixed order."""
    for node in nodes_below(roots):
        for slot_name, value_name in _slot_names(type(node)):  # type: ignore[arg-type]
            values, again = getattr(node, value_name), getattr(node, value_name)
            if values is None:
                continue
            slots = getattr(node, slot_name)
            if isinstance(values, torch.Tensor):
                values, again, slots = (values,), (again,), (slots,)
            for slot, tensor, second in zip(slots, values, again, strict=True):
                if isinstance(tensor, torch.Tensor):
                    # unpacked twice: an alias of autograd's own comes out new each time
                    yield Saved(slot, tensor, node.name(), tensor._cdata == second._cdata)


@cache
def _slot_names(node_type: type) -> tuple[tuple[str, str], ...]:
    """Pairs (slot attribute, value attribute) of one kind of node; ``dir`` is slow, so cached."""
    pairs = []
    for name in dir(node_type):
        if name == "_raw_saved_tensors" and hasattr(node_type, "saved_tensors"):
            pairs.append((name, "saved_tensors"))  # a torch.autograd.Function's context
        elif name.startswith("_raw_saved_"):
            pairs.append((name, "_saved_" + name.removeprefix("_raw_saved_")))
    return tuple(pairs)


def _tensor_is_shared(same: list[torch.Tensor]) -> bool:
    """Whether others hold a tensor that this graph saved in ``len(same)`` slots."""
    slots, tensor = len(same), same.pop()
    same.clear()
    in_c, in_python = _references(tensor)
    return in_c > slots + 1 or in_python > _references_of_unshared()


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    """References to the tensor from C++ (its Python object counts as one) and from Python."""
    use_count = getattr(tensor, "_use_count", None)  # torch >= 2.9
    return use_count() if use_count is not None else 0, sys.getrefcount(tensor)


@cache
def _references_of_unshared() -> int:
    """What `_references` sees from Python of a tensor that only a graph holds."""
    doubled = torch.ones(2, requires_grad=True) * 2
    squared = doubled**2
    del doubled
    same = [saved.tensor for saved in saved_tensors(roots_of(squared))]
    tensor = same.pop()
    return _references(tensor)[1]


def why_kept(tensor: torch.Tensor) -> Kept | None:
    """Why this tensor must stay, from what it is alone (see `Kept`)."""
    if isinstance(tensor, torch.nn.Parameter):
        return Kept.PARAMETER
    if tensor.is_leaf and tensor.requires_grad:
        return Kept.INPUT
    # Subclasses (DTensor, fp8 wrappers) carry state that bytes alone do not rebuild.
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return Kept.SPECIAL
    return None
