"""Chunk 1's view of the pipeline: stage x is stage p-1-x.

Releases ask in two ways where a module stands: through ``parallel_state`` and through the pipeline
group of a collection of groups.  Both are answered from the other end while chunk 1 is built, runs
or is saved.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

UPWARD_CHUNK = 1


class Place(dist.ProcessGroup):
    """A stage's number and the number of stages; has no backend, so nothing can be sent in it."""

    def __init__(self, stage: int, stages: int) -> None:
        super().__init__(stage, stages)  # type: ignore[call-arg]


@dataclass
class Mirror:
    """Turns the pipeline round for chunk 1.

    Args:
        parallel_state: Megatron's module.
        stock_group: its own ``get_pipeline_model_parallel_group``.
    """

    parallel_state: Any
    stock_group: Callable[..., Any]
    _place: Place | None = None  # while something sees the pipeline from its other end

    @property
    def stage(self) -> int:
        """This rank's stage, whoever looks."""
        return int(self.stock_group().rank())

    def group(self, *positional: Any, **named: Any) -> Any:
        """What stands for ``get_pipeline_model_parallel_group``."""
        return self._place if self._place is not None else self.stock_group(*positional, **named)

    @contextlib.contextmanager
    def seen_by(self, chunk: int | None) -> Iterator[None]:
        """Within this, Megatron's questions are answered as ``chunk`` of this rank needs it."""
        if chunk != UPWARD_CHUNK or self._place is not None:
            yield
            return
        self._place = self.other_end()
        self.parallel_state.set_pipeline_model_parallel_rank(self._place.rank())
        try:
            yield
        finally:
            self._place = None
            self.parallel_state.set_pipeline_model_parallel_rank(None)

    def turned(self, value: Any) -> Any:
        """A collection of process groups with the pipeline's turned; anything else as it is."""
        if not hasattr(value, "pp") or not isinstance(value.pp, dist.ProcessGroup):
            return value
        turned = copy.copy(value)
        turned.pp = self.other_end()
        return turned

    def wrapped(self, function: Callable[..., Any], chunk: int) -> Callable[..., Any]:
        """``function``, always called as ``chunk`` sees the pipeline."""

        @functools.wraps(function)
        def call(*positional: Any, **named: Any) -> Any:
            with self.seen_by(chunk):
                return function(*positional, **named)

        return call

    def other_end(self) -> Place:
        """This stage as it is counted from the pipeline's other end."""
        group = self.stock_group()
        return Place(group.size() - 1 - group.rank(), group.size())
