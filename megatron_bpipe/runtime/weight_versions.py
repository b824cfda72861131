"""Several versions of a stage's weights at a time, for schedules without a flush.

A version is never written to while a later op needs it: autograd saves Parameters and views of
them, so what a forward saved must still be there, unchanged, in its backward.  Every op points all
parameters' ``.data`` at its version first; the optimizer writes into a buffer that no op needs::

    2BW, call t      ops of iteration t at w(t-1), the forwards ahead at w(t)
    its end          the buffer of w(t-1) becomes a copy of w(t), and the parameters point there
    optimizer.step   makes w(t+1) of it, in place

So 2BW has two buffers and PipeDream p-x.  A version that is dead when its successor is made (every
flush, PipeDream's last stage) is its own successor: nothing is copied.

Sources: Narayanan et al. 2019 (PipeDream, weight stashing), 2021 (PipeDream-2BW, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_bpipe.runtime.torch_internals import copy_all, set_versions, storage_id, version

Buffer = list[torch.Tensor]


@dataclass
class WeightVersions:
    """The versions of one stage's trained parameters; numbers count updates since the last flush.

    Args:
        parameters: what the optimizer changes, in place, and nobody else.
    """

    parameters: Sequence[torch.nn.Parameter]
    newest: int = 0
    _buffers: dict[int, Buffer] = field(default_factory=dict)
    _spare: list[Buffer] = field(default_factory=list)
    _used: int | None = None  # the version that the parameters point at
    _counters: list[int] = field(default_factory=list)

    @torch.no_grad()
    def begin(self, number: int) -> None:
        """A call begins, this one since the last flush: the newest version has its number.

        Autograd is told that the optimizer's writes were none: what it saved of a parameter is
        still there, in the buffer of its version.
        """
        if number == 0:
            assert len(self._buffers) <= 1, "a flush leaves one version"
            self._buffers = {0: [p.data for p in self.parameters]}
            self.newest = self._used = 0
            self._counters = [version(p) for p in self.parameters]
        else:
            assert number == self.newest, (number, self.newest)
            set_versions(self.parameters, self._counters)

    def use(self, wanted: int) -> None:
        """The next op computes with this version."""
        if wanted != self._used:
            for parameter, data in zip(self.parameters, self._buffers[wanted], strict=True):
                parameter.data = data
            self._used = wanted

    @torch.no_grad()
    def advance(self, oldest: int) -> None:
        """A call has ended: point at a buffer in which the optimizer may make the next version.

        ``oldest`` is the oldest version that later calls need, ``newest + 1`` for none so far.
        """
        present = self._buffers[self.newest]
        for dead in [number for number in self._buffers if number < oldest]:
            buffer = self._buffers.pop(dead)
            if dead != self.newest:
                self._spare.append(buffer)
        if self.newest in self._buffers:  # it is needed: its successor comes into another buffer
            following = self._spare.pop() if self._spare else [torch.empty_like(t) for t in present]
            copy_all(following, present)
        else:
            following = present
        self.newest += 1
        self._buffers[self.newest] = following
        self.use(self.newest)

    def forget(self) -> None:
        """Only the newest version is needed from here on."""
        self.use(self.newest)
        for number in [n for n in self._buffers if n != self.newest]:
            self._spare.append(self._buffers.pop(number))

    def storages(self) -> set[int]:
        """Identities of all buffers' storages."""
        every = [*self._buffers.values(), *self._spare]
        return {storage_id(t.untyped_storage()) for buffer in every for t in buffer}

    @property
    def bytes_of_one(self) -> int:
        """Bytes of one version."""
        return sum(p.numel() * p.element_size() for p in self.parameters)
