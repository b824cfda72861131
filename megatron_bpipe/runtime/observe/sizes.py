"""How large a stage's activations are, chunk by chunk, and how much of them can leave."""

from __future__ import annotations

import statistics
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
        """Bytes of one activation of each chunk: what is shared counts in the first one only."""
        return tuple(round(statistics.median(self._held[c])) for c in sorted(self._held))

    @property
    def leaving(self) -> tuple[int, ...]:
        """Most bytes of it that can leave, room for alignment included."""
        return tuple(max(self._leaving[c]) for c in sorted(self._leaving))
