"""The two copies of the model on each rank, and who has the others of the same part."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_bpipe.integration.patches.v_placement.mirror import UPWARD_CHUNK, Mirror, Place

DOWNWARD_COPY, UPWARD_COPY = 0, UPWARD_CHUNK
WAYS = (DOWNWARD_COPY, UPWARD_COPY)


@dataclass(frozen=True)
class PartGroup:
    """All ranks with a copy of one part of the model.

    Attributes:
        group: of processes, the downward copies first.
        owner: global rank whose copy Megatron would have without a second pipeline.
    """

    group: Any
    owner: int


@dataclass
class Copies(Mirror):
    """The mirror, and data parallelism over both directions.

    Args:
        data_group: Megatron's own ``get_data_parallel_group``.
    """

    data_group: Callable[..., Any] = field(kw_only=True)
    parts: dict[int, PartGroup] = field(default_factory=dict)
    optimizers: tuple[Any, ...] = ()  # of the downward and the upward copy
    _answer: Any = None  # what stands for the data-parallel group just now

    @property
    def part(self) -> int:
        """Which part of the model is meant just now: that of stage x, or p-1-x within `seen_by`."""
        return int(self.group().rank())

    def data_parallel_group(self, *positional: Any, **named: Any) -> Any:
        """What stands for ``get_data_parallel_group``."""
        return self.data_group(*positional, **named) if self._answer is None else self._answer

    @contextlib.contextmanager
    def averaged_over_copies(self) -> Iterator[None]:
        """Within this, data parallelism is over all copies of this part."""
        with self._answering(self.parts[self.part].group):
            yield

    def with_data_groups(self, groups: Any, group: Any) -> Any:
        """A collection of process groups with this one for data parallelism."""
        changed = copy.copy(groups)
        for name in ("dp", "dp_cp", "intra_dp_cp"):
            if hasattr(changed, name):
                setattr(changed, name, group)
        return changed

    @contextlib.contextmanager
    def fed_as(self, way: int) -> Iterator[None]:
        """Within this, data is chosen for this way's replica: those that go down come first."""
        group = self.data_group()
        with self._answering(Place(way * group.size() + group.rank(), len(WAYS) * group.size())):
            yield

    @contextlib.contextmanager
    def _answering(self, group: Any) -> Iterator[None]:
        before, self._answer = self._answer, group
        try:
            yield
        finally:
            self._answer = before

    def meet(self, minutes: float) -> None:
        """Make the groups of all parts; collective of all ranks.

        Args:
            minutes: after which a collective of such a group fails.
        """
        pipeline = dist.get_process_group_ranks(self.stock_group())
        replicas = dist.get_process_group_ranks(self.data_group())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (tuple(pipeline), tuple(replicas)))
        pipelines = {rank: pipe for rank, (pipe, _) in enumerate(everyone)}
        # newer torch can keep the order; it decides in which order more than two are summed
        kept = "sort_ranks" in inspect.signature(dist.new_group).parameters
        order: dict[str, Any] = {"sort_ranks": False} if kept else {}
        for down in sorted({replicas for _, replicas in everyone}):
            part = pipelines[down[0]].index(down[0])
            up = [pipelines[rank][-1 - part] for rank in down]
            ranks = [*down, *up]
            group = dist.new_group(ranks, timeout=timedelta(minutes=minutes), **order)
            if dist.get_rank() in ranks:
                self.parts[part] = PartGroup(group, down[0])

    def by_part(self, of_copies: list[Any]) -> list[Any]:
        """What each copy has, in the order of their parts: the same order on both stages."""
        size = self.stock_group().size()
        return list(of_copies) if self.stage < size - 1 - self.stage else list(reversed(of_copies))
