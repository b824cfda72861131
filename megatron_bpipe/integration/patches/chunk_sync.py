"""When gradients of each model chunk are reduced and its parameters gathered, as Megatron does it.

Megatron starts these collectives at the same virtual micro-batch on all stages, so that stages
that wait for one another's messages also wait for the same collectives::

    config.param_sync_func   chunks 0 and 1 at the start; chunk c+1 (c > 0) before the forward that
                             is ``pp_rank`` before the first one of chunk c
    config.grad_sync_func    after the backward that is ``pp_rank`` after the last one of a chunk
    neither                  gradients of a chunk are reduced from its last backward on

Where weight gradients come later than the rest of the backward (W), a chunk's gradients are
complete only after its last W, while its parameters count as ready in the backward. So nothing is
reduced before the last op, and then everything is. So it is too where two stages that reduce
together are done with their models at times, and in an order, of their own.

Source: ``forward_backward_pipelining_with_interleaving`` (``forward_step_helper``,
``backward_step_helper``), alike from 0.14 to main.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_bpipe.schedule.ops import Kind, Op


@dataclass
class ChunkSync:
    """Gradient and parameter collectives of one stage in one iteration.

    Args:
        config: Megatron's; its ``no_sync_func``, ``grad_sync_func`` and ``param_sync_func`` are a
            function or, with several chunks, a list of one for each.
        chunks: the stage's model chunks.
        ops: the stage's ops, whose forwards and backwards stand in the order of all stages.
        rank: of the stage in the pipeline.
        at_end: reduce nothing before the last op, and then the chunks in their order.
    """

    config: Any
    chunks: Sequence[Any]
    ops: Sequence[Op]
    rank: int
    at_end: bool = False
    _stopped: contextlib.ExitStack | None = None
    _synchronised: set[int] = field(default_factory=set)
    _first: dict[int, int] = field(default_factory=dict)  # number of a chunk's first forward
    _last: dict[int, int] = field(default_factory=dict)  # number of a chunk's last backward
    _done: dict[Kind, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        forwards = [op.chunk for op in self.ops if op.kind is Kind.FORWARD]
        backwards = [op.chunk for op in self.ops if op.kind is Kind.BACKWARD]
        self._last = {chunk: number for number, chunk in enumerate(backwards)}
        self._first = {forwards[number]: number for number in reversed(range(len(forwards)))}
        self._done = {Kind.FORWARD: 0, Kind.BACKWARD: 0}
        self.at_end = self.at_end or any(op.kind is Kind.WEIGHT for op in self.ops)
        self._stop()
        for chunk in range(min(2, len(self.chunks))):
            self._gather(chunk)

    def before_forward(self) -> None:
        """A forward is about to run."""
        number = self._done[Kind.FORWARD] + self.rank
        self._done[Kind.FORWARD] += 1
        for chunk, first in self._first.items():
            if first == number and 1 < chunk + 1 < len(self.chunks):
                self._gather(chunk + 1)

    def before_backward(self, chunk: int) -> None:
        """A backward of this chunk is about to run."""
        if self.at_end:
            return
        if self.config.grad_sync_func is None and self._last[chunk] == self._done[Kind.BACKWARD]:
            self._go()
            self._synchronised.add(chunk)

    def after_backward(self) -> None:
        """A backward has run."""
        if self.at_end:
            return
        number = self._done[Kind.BACKWARD] - self.rank
        self._done[Kind.BACKWARD] += 1
        if self.config.grad_sync_func is not None:
            for chunk, last in self._last.items():
                if last == number:
                    self._go()
                    self._reduce(chunk)
        self._stop()

    def finish(self) -> None:
        """All backwards have run: reduce what is left."""
        self._go()
        if self.config.grad_sync_func is not None:
            for chunk in range(len(self.chunks)):
                if chunk not in self._synchronised:
                    self._reduce(chunk)
        elif self.at_end:
            for ddp in self.chunks:
                if getattr(getattr(ddp, "ddp_config", None), "overlap_grad_reduce", False):
                    ddp.start_grad_sync()  # its hooks, which would, found nothing ready

    def _gather(self, chunk: int) -> None:
        gather = _of_chunk(self.config.param_sync_func, chunk)
        if gather is not None:
            gather(self.chunks[chunk].parameters())

    def _reduce(self, chunk: int) -> None:
        reduce = _of_chunk(self.config.grad_sync_func, chunk)
        assert reduce is not None
        reduce(self.chunks[chunk].parameters())
        self._synchronised.add(chunk)

    def _stop(self) -> None:
        """No reductions from here on."""
        if self._stopped is None:
            given = self.config.no_sync_func or contextlib.nullcontext
            self._stopped = contextlib.ExitStack()
            for no_sync in given if isinstance(given, list) else [given]:
                self._stopped.enter_context(no_sync())

    def _go(self) -> None:
        """Reductions from here on."""
        if self._stopped is not None:
            self._stopped.close()
            self._stopped = None


def _of_chunk(given: Any, chunk: int) -> Callable[[Any], Any] | None:
    found: Callable[[Any], Any] | None = given[chunk] if isinstance(given, list) else given
    return found
