"""One shape on a cluster, and the partitions of the layers that its ways are tried with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.stages import BORDERLINE, GIB, memory_by_stage
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.planner.evaluate import Candidate, Predictor, memory_of
from megatron_bpipe.planner.partition import StageLimits, balanced_partition
from megatron_bpipe.planner.space import Question

Partition = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """One shape on a cluster, with what every way to run it needs.

    ``base`` is plain 1F1B, or interleaved where that is given, as ``space.shapes`` has it.
    """

    question: Question
    base: Candidate
    predictor: Predictor

    @cached_property
    def fast(self) -> list[Partition]:
        """1F1B's that are fast: even (empty), where layers divide, and balanced in time."""
        run = self.base.run
        if self.question.fixed.layers.words:
            return [run.partition]
        layers, p = run.model.layers, run.layout.pp
        even: list[Partition] = [] if layers % p else [()]
        return [*even, *self._unlike([layers] * p)]

    def with_fitting(self, run: Run) -> list[Partition]:
        """Those, and the fastest of which this run surely fits."""
        limited: list[Partition] = []
        if not self.question.fixed.layers.uneven:
            limited = self._unlike(self._most_layers(run))
        return list(dict.fromkeys([*self.fast, *limited]))

    @cached_property
    def zb_h1(self) -> list[Run]:
        """ZB-H1 with each of those partitions; none where it may not run."""
        run = self.base.run
        if run.chunks > 1 or run.layout.pp == 1 or not self.question.may_run("zb-h1"):
            return []
        run = replace(run, schedule="zb-h1")
        return [with_layers(run, part) for part in self.with_fitting(run)]

    @cached_property
    def fits_plainly(self) -> bool:
        """Whether 1F1B surely fits with a partition that is fast."""
        return any(self.surely_fits(with_layers(self.base.run, part)) for part in self.fast)

    def surely_fits(self, run: Run) -> bool:
        """Whether this run does."""
        try:
            return memory_of(replace(self.base, run=run), self.predictor).fits == "yes"
        except EstimateError:
            return False

    def two_ways(self, run: Run) -> list[Partition]:
        """The same of the V placement: of each stage's layers half in each chunk.

        ``run`` has its schedule and two chunks.
        """
        layers, p = run.model.layers, run.layout.pp
        given = self.question.fixed.layers
        if given.words:
            return [self.base.run.partition] if self.base.run.chunks == 2 else []
        even: list[Partition] = [] if layers % (2 * p) else [()]
        if not self.question.uneven or layers < 2 * p:
            return even
        found = [[layers] * p, self._most_layers(run)]
        parts = [balanced_partition(self._limits(most, 0), layers) for most in found]
        unlike = [folded(part) for part in parts if part is not None and min(part) > 1]
        return list(dict.fromkeys([*even, *(part for part in unlike if len(set(part)) > 1)]))

    def _unlike(self, most: Sequence[int]) -> list[Partition]:
        """The one balanced in time, at most so many layers a stage, if stages are unlike."""
        if not self.question.uneven:
            return []
        p = self.base.run.layout.pp
        found = balanced_partition(self._limits(most, p - 1), self.base.run.model.layers)
        return [found] if found is not None and len(set(found)) > 1 else []

    def _limits(self, most: Sequence[int], head: int) -> list[StageLimits]:
        """Time of each stage's layers and output layer, with the most layers each may have."""
        paces = self.base.machine.paces
        return [
            StageLimits(pace.layer, pace.head if stage == head else 0.0, limit)
            for stage, (pace, limit) in enumerate(zip(paces, most, strict=True))
        ]

    def _most_layers(self, run: Run) -> list[int]:
        """How many layers surely fit on each stage: without eviction memory is linear in them."""
        few, step = run.chunks, run.chunks
        one, two = (self._with_as_many(run, k) for k in (few, few + step))
        most = []
        for gpu, with_few, with_more in zip(self.base.gpus, one, two, strict=True):
            room = (1 - BORDERLINE) * gpu.memory_gib * GIB - with_few
            most.append(max(0, few + int(step * room // (with_more - with_few))))
        return most

    def _with_as_many(self, run: Run, layers: int) -> list[int]:
        """Bytes of each stage if each had so many layers."""
        model = replace(run.model, layers=layers * run.layout.pp, moe_layers="")
        stored = self.predictor.stored_for(run)
        alike = replace(run, model=model, partition=())
        stages = memory_by_stage(alike, stored.kernels, stored.state, stored.overhead)
        return [stage.total for stage in stages]


def with_layers(run: Run, partition: Partition) -> Run:
    """The same with these layers on its stages."""
    return replace(run, partition=partition)


def folded(stages: Sequence[int]) -> Partition:
    """Layers of each stage as those of its two chunks, down and back up; a first one may be more.

    The head lies with the last part, on stage 0, so that chunk has the fewer.
    """
    down = [-(-layers // 2) for layers in stages]
    up = [layers // 2 for layers in stages]
    return (*down, *reversed(up))
