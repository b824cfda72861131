"""Everything of torch's that has no public name, and whether the torch at hand has it.

No other module touches such a name. `probe` tries each of them on small graphs of its own, so that
a torch that changed one is found by ``doctor`` and before training, not by a wrong gradient.

    _raw_saved_*, _saved_*     what a node of the autograd graph saved, slot by slot
    _sequence_nr               how late in its forward a node was made
    _cdata                     identity of a tensor or storage, whatever Python object wraps it
    _storage_Use_Count         how many hold a storage
    _use_count                 how many hold a tensor from C++ (torch 2.9)
    SavedTensor.unpack_hook    whose hooks a slot has (torch 2.10)
    SavedTensor.data           what a slot holds, without unpacking it (torch 2.10)
    _push_saved_tensors_default_hooks   where hooks come from, for older torch
    _unsafe_set_version_counter         a write that autograd is not to see (two signatures so far)
    _construct_storage_from_data_pointer, _foreach_copy_, ProcessGroup._shutdown   for transports
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# autograd's node and slot classes have no public Python type
Node = Any
Slot = Any
Hook = Callable[[Any], Any]

SHOWS_HOOKS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
COUNTS_TENSORS = hasattr(torch.Tensor, "_use_count")
HOOKS_ARE_SET_BY = torch._C._autograd, "_push_saved_tensors_default_hooks"
HAS_NAMES = hasattr(torch.Tensor, "has_names")  # gone in torch 2.13


class Reading(NamedTuple):
    """One slot of a node.

    Attributes:
        slot: takes hooks, once.
        value: the tensor as autograd would unpack it, or whatever else was saved. Of a slot that
            was not read, what lies in it, as far as this torch shows it.
        hooked: the slot has somebody's hooks: reading would run them, so it was not read.
        changed: a tensor was changed in place since it was saved: autograd does not give it out.
        original: the slot holds this very tensor, not an alias of its own; only if asked for.
    """

    slot: Slot
    value: object = None
    hooked: bool = False
    changed: bool = False
    original: bool = False


class _HookedError(Exception):
    """Raised in place of somebody's unpack hook while slots are only looked at."""


# node types by weak reference: a Function class made inside a forward must not live for ever, nor
# whatever its methods close over
_names: WeakKeyDictionary[type, tuple[tuple[str, str], ...]] = WeakKeyDictionary()
_looking = False


def sequence_of(node: Node) -> int:
    """How late in its forward a node was made: a backward runs them from high numbers to low."""
    return int(node._sequence_nr())


def storage_id(storage: torch.UntypedStorage) -> int:
    """The same for every Python object that wraps this storage."""
    return int(storage._cdata)


def tensor_id(tensor: torch.Tensor) -> int:
    """The same for every Python object that wraps this tensor; aliases differ."""
    return int(tensor._cdata)


def storage_holders(storage: torch.UntypedStorage) -> int:
    """How many tensors and storage objects hold it, ``storage`` itself included."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def storage_behind(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """What a weak reference refers to, None if it is gone."""
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return storage


def tensor_references(tensor: torch.Tensor) -> tuple[int, int]:
    """References from C++ (the Python object counts as one; 0: unknown) and from Python."""
    in_c = torch.Tensor._use_count(tensor) if COUNTS_TENSORS else 0  # type: ignore[attr-defined]
    return in_c, sys.getrefcount(tensor)


@functools.cache
def references_of_unshared() -> int:
    """What `tensor_references` sees from Python of a tensor that only a graph holds."""
    doubled = torch.ones(2, requires_grad=True) * 2
    squared = doubled**2
    del doubled
    same = [reading.value for reading in read_slots(squared.grad_fn)]
    tensor = same.pop()
    assert isinstance(tensor, torch.Tensor)
    return tensor_references(tensor)[1]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Its storage, None if there is none or no memory behind it.

    Sparse tensors have none. Those of wrapper subclasses (quantised weights, jagged tensors) have a
    size and no address, those that were emptied (``resize_(0)``) neither.
    """
    try:
        storage = tensor.untyped_storage()
        # what a wrapper has for a storage refuses to say where it is
        return storage if storage.nbytes() and storage.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None


def is_parameter(tensor: torch.Tensor) -> bool:
    """As ``isinstance`` has it, which for plain tensors takes a microsecond."""
    if type(tensor) is torch.Tensor:
        return hasattr(tensor, "_is_param")
    return isinstance(tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes, type, shape and strides are all there is to it.

    Not so for subclasses (DTensor, fp8 wrappers), sparse, nested, quantised and named tensors, and
    for those that are conjugated or negated by a mark.
    """
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_neg()
        and not (tensor.dtype.is_complex and tensor.is_conj())
        and not (HAS_NAMES and torch.Tensor.has_names(tensor))  # type: ignore[attr-defined]
    )


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its target in one call, which lets the interpreter lock go once."""
    torch._foreach_copy_(targets, sources)


def storage_at(address: int, size: int, device: torch.device) -> torch.UntypedStorage:
    """A storage on memory that is not torch's; it does not own it."""
    construct = torch._C._construct_storage_from_data_pointer
    return cast("torch.UntypedStorage", construct(address, device, size))


def leave(group: Any) -> None:
    """Shut a process group down that torch does not know of."""
    shutdown = getattr(group, "shutdown", None) or group._shutdown  # its name before torch 2.7
    shutdown()


def version(tensor: torch.Tensor) -> int:
    """Counts changes in place, of all aliases together."""
    return int(tensor._version)


def set_versions(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Let autograd take these tensors for unchanged since `version` gave these numbers."""
    setter = torch._C._autograd._unsafe_set_version_counter
    try:
        setter(tuple(tensors), tuple(versions))
    except TypeError:  # one by one before torch 2.7
        for tensor, number in zip(tensors, versions, strict=True):
            setter(tensor, number)  # type: ignore[arg-type]


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that a view was made from, and that it keeps."""
    return tensor._base


def read_slots(node: Node, *, originals: bool = False) -> Iterator[Reading]:
    """All slots of ``node``; those that have hooks are recognised and not read."""
    for slot_name, value_name in _slot_names(type(node)):
        slots = getattr(node, slot_name)
        if slots is None:
            continue
        several = isinstance(slots, (tuple, list))
        if not several:
            slots = (slots,)
        if SHOWS_HOOKS and any(slot.unpack_hook is not None for slot in slots):
            yield from (Reading(slot, _unread(slot), hooked=True) for slot in slots)
            continue
        try:
            values = getattr(node, value_name) if SHOWS_HOOKS else _look(node, value_name)
        except _HookedError:
            yield from (Reading(slot, _unread(slot), hooked=True) for slot in slots)
            continue
        except RuntimeError:  # autograd's check of the version
            yield from (Reading(slot, _unread(slot), changed=True) for slot in slots)
            continue
        if not several:
            values = (values,)
        if not originals:
            for slot, value in zip(slots, values or (), strict=True):
                yield Reading(slot, value)
            continue
        # an alias of autograd's own comes out new each time
        held = [slot.data for slot in slots] if SHOWS_HOOKS else _look(node, value_name)
        held = held if several or SHOWS_HOOKS else (held,)
        for slot, value, same in zip(slots, values or (), held or (), strict=True):
            is_tensor = isinstance(value, torch.Tensor)
            yield Reading(slot, value, original=is_tensor and tensor_id(same) == tensor_id(value))


def _unread(slot: Slot) -> object:
    return slot.data if SHOWS_HOOKS else None


def _look(node: Node, value_name: str) -> Any:
    global _looking
    _looking = True
    try:
        return getattr(node, value_name)
    finally:
        _looking = False


def _slot_names(node_type: type) -> tuple[tuple[str, str], ...]:
    """Pairs (slot attribute, value attribute) of one kind of node; ``dir`` is slow, so kept."""
    names = _names.get(node_type)
    if names is None:
        pairs = []
        for name in dir(node_type):
            if name == "_raw_saved_tensors" and hasattr(node_type, "saved_tensors"):
                pairs.append((name, "saved_tensors"))  # a torch.autograd.Function's context
            elif name.startswith("_raw_saved_"):
                pairs.append((name, "_saved_" + name.removeprefix("_raw_saved_")))
        names = _names[node_type] = tuple(pairs)
    return names


def let_hooks_be_seen(stock: Callable[[Hook, Hook], None]) -> Callable[[Hook, Hook], None]:
    """What stands in the place of `HOOKS_ARE_SET_BY` where a slot does not show its hooks.

    An unpack hook that is set as a default one (`torch.autograd.graph.saved_tensors_hooks`,
    non-reentrant checkpoints, offloading) is wrapped, so that `read_slots` ends in an exception
    instead of running it.
    """

    def push(pack: Hook, unpack: Hook) -> None:
        def unpack_unless_looking(packed: Any) -> Any:
            if _looking:
                raise _HookedError
            return unpack(packed)

        stock(pack, unpack_unless_looking)

    return push


def probe() -> list[str]:
    """What this torch lacks or does differently; nothing if all is as it must be."""
    lacking = [
        name
        for name, there in (
            ("torch._C._storage_Use_Count", hasattr(torch._C, "_storage_Use_Count")),
            ("torch.Tensor._cdata", hasattr(torch.Tensor, "_cdata")),
            (
                "SavedTensor.unpack_hook or _push_saved_tensors_default_hooks",
                SHOWS_HOOKS or hasattr(*HOOKS_ARE_SET_BY),
            ),
            (
                "torch._C._autograd._unsafe_set_version_counter",
                hasattr(torch._C._autograd, "_unsafe_set_version_counter"),
            ),
        )
        if not there
    ]
    if lacking:
        return lacking
    setter = getattr(*HOOKS_ARE_SET_BY)
    if not SHOWS_HOOKS:
        setattr(*HOOKS_ARE_SET_BY, let_hooks_be_seen(setter))
    try:
        return [what for what, right in _behaviour() if not right]
    finally:
        setattr(*HOOKS_ARE_SET_BY, setter)


def _behaviour() -> Iterator[tuple[str, bool]]:
    ran = []

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        ran.append(packed)
        return packed

    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        saved_input = leaf * 2
        squared = saved_input**2
        exponential = squared.exp()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            hooked = exponential.sin()
    readings = list(read_slots(hooked.grad_fn))
    yield (
        "a slot with hooks is recognised unread",
        bool(readings and all(r.hooked for r in readings) and not ran),
    )
    original = list(read_slots(squared.grad_fn, originals=True))
    alias = list(read_slots(exponential.grad_fn, originals=True))
    yield (
        "a later node has a higher number",
        sequence_of(exponential.grad_fn) > sequence_of(squared.grad_fn),
    )
    yield "a node's slots are read", len(original) == len(alias) == 1
    yield "an original is told from an alias", original[0].original and not alias[0].original
    storage = saved_input.untyped_storage()
    yield "a storage's holders are counted", storage_holders(storage) == 2
    packed: list[torch.Tensor] = []
    original[0].slot.register_hooks(packed.append, lambda _: packed[0])
    yield "hooks put on a finished graph are used", len(packed) == 1
    yield "an alias is one more holder", storage_holders(storage) == 3
    with torch.no_grad():
        saved_input.add_(1)
        exponential.add_(1)
    yield "aliases share a version", version(packed[0]) == version(saved_input) == 1
    yield "a change in place is seen", all(r.changed for r in read_slots(exponential.grad_fn))
    set_versions([saved_input, exponential], [0, 0])
    yield "a version can be set", version(saved_input) == version(exponential) == 0
