"""How large a stage's activations are, chunk by chunk, and how much of them can leave."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from megatron_bpipe.runtime.block import padded
from megatron_bpipe.runtime.graph import roots_of, saved_storages
from megatron_bpipe.runtime.observe.recorder import Recorder
from megatron_bpipe.runtime.transport import TransferHandle
from megatron_bpipe.schedule.ops import Op


@dataclass
class SizeMeter:
    """Observer of one iteration; see `executor.Observer`.

    Args:
        recorder: another observer of it, told before this one.
    """

    recorder: Recorder
    _held: dict[int, list[int]] = field(default_factory=dict)
    _leaving: dict[int, list[int]] = field(default_factory=dict)

    def forward_begins(self, op: Op) -> None:
        """Nothing yet."""

    def forward_done(self, op: Op, output: object) -> None:
        """Note what it saved."""
        entries = (entry for entry in saved_storages(roots_of(output)) if entry.kept is None)
        leaving = sum(padded(entry.storage.nbytes()) for entry in entries)
        self._leaving.setdefault(op.chunk, []).append(leaving)
        held = self.recorder.activation_bytes(op.key)
        self._held.setdefault(op.chunk, []).append(held)

    def op_done(self, op: Op, start: float, end: float, moved: int) -> None:
        """No interest."""

    def transfer_done(self, op: Op, transfer: TransferHandle) -> None:
        """No interest."""

    @property
    def held(self) -> tuple[int, ...]:
        """Bytes of one activation of each chunk: what is shared counts in the first one only."""
        return tuple(round(statistics.median(self._held[c])) for c in sorted(self._held))

    @property
    def leaving(self) -> tuple[int, ...]:
        """Most bytes of it that can leave, room for alignment included."""
        return tuple(max(self._leaving[c]) for c in sorted(self._leaving))
