"""How large a stage's activations are, chunk by chunk, and how much of them can leave."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_bpipe.runtime.block import padded
from megatron_bpipe.runtime.graph import roots_of, saved_storages


@dataclass
class ActivationSizes:
    """Of the first iteration."""

    _held: dict[int, list[int]] = field(default_factory=dict)
    _leaving: dict[int, list[int]] = field(default_factory=dict)

    def note(self, chunk: int, output: object, held: int) -> None:
        """A forward is over, and nothing of it has left; ``held`` bytes are its own."""
        entries = (entry for entry in saved_storages(roots_of(output)) if entry.kept is None)
        leaving = sum(padded(entry.storage.nbytes()) for entry in entries)
        self._leaving.setdefault(chunk, []).append(leaving)
        self._held.setdefault(chunk, []).append(held)

    @property
    def held(self) -> tuple[int, ...]:
        """Most bytes of one activation of each chunk.

        What micro-batches share (a mask, a rotary table) counts in the first one, which is left
        out.
        """
        return tuple(max(self._held[c][1:] or self._held[c]) for c in sorted(self._held))

    @property
    def leaving(self) -> tuple[int, ...]:
        """Most bytes of it that can leave, room for alignment included."""
        return tuple(max(self._leaving[c]) for c in sorted(self._leaving))


@dataclass
class WorkingMemory:
    """What computing needs beside activations, from the allocator in the first iteration.

    Libraries allocate workspaces then that stay. So what is beside activations now is what stays,
    at most as much as at any later op boundary, and what computing needs.
    """

    _samples: list[tuple[int, bool]] = field(default_factory=list)  # bytes, at an op boundary

    def between_ops(self, allocated: int, live: int) -> None:
        """An op is over: bytes that the allocator has handed out, bytes of activations."""
        self._samples.append((allocated - live, True))

    def within_op(self, allocated: int, live: int) -> None:
        """The same at some time in an op, ``live`` at its most in that op."""
        self._samples.append((allocated - live, False))

    @property
    def most(self) -> int | None:
        """Bytes; None if nothing was seen."""
        if not self._samples:
            return None
        most, stays = 0, self._samples[-1][0]
        for beside, at_boundary in reversed(self._samples):
            if at_boundary:
                stays = min(stays, beside)
            most = max(most, beside - stays)
        return most
