"""Reading what autograd saved for one micro-batch, from its finished graph.

Nothing is hooked while the forward runs: micro-batches that stay cost nothing. The graph of one
that leaves is walked from the stage's output, and each node's ``_raw_saved_*`` slots are read.
A Parameter, and the stage's input (a leaf that requires grad), are held by others until their
backward, so they never leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

# autograd's node and slot classes have no public Python type
Node = Any
Slot = Any


class Saved(NamedTuple):
    """One saved tensor: the slot that takes hooks, and the tensor as autograd would unpack it."""

    slot: Slot
    tensor: torch.Tensor
    node: str


def roots_of(output: object) -> list[Node]:
    """Graph roots of a stage's output, a tensor or a list of tensors."""
    tensors = output if isinstance(output, (list, tuple)) else [output]
    return [t.grad_fn for t in tensors if isinstance(t, torch.Tensor) and t.grad_fn is not None]


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


def saved_tensors(roots: Sequence[Node]) -> Iterator[Saved]:
    """Every tensor saved below ``roots``, each slot once, in a fixed order.

    Raises:
        RuntimeError: by autograd, where a saved tensor has been changed in place: reading a slot
            runs the version check that hooks would otherwise switch off.
    """
    seen = set(roots)
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        for slot_name, value_name in _slot_names(type(node)):  # type: ignore[arg-type]
            value = getattr(node, value_name)
            if value is None:
                continue
            slot = getattr(node, slot_name)
            if isinstance(value, torch.Tensor):
                value, slot = (value,), (slot,)
            for one, tensor in zip(slot, value, strict=True):
                if isinstance(tensor, torch.Tensor):
                    yield Saved(one, tensor, node.name())
        for below, _ in reversed(node.next_functions):
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)


def may_leave(tensor: torch.Tensor) -> bool:
    """Whether a saved tensor is plain bytes that nothing but its graph needs to stay in place."""
    # Subclasses (Parameter, DTensor, fp8 wrappers) carry state that bytes alone do not rebuild.
    if type(tensor) is not torch.Tensor or (tensor.is_leaf and tensor.requires_grad):
        return False
    # Lazily conjugated or negated, sparse and quantised tensors are not one block of plain bytes.
    plain = not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    return plain and tensor.layout is torch.strided
