"""One stage of a pipeline that is not empty between two iterations.

begin      which ops this call has; the weights that they need are there
wrapped    the stage, which points all parameters at each op's weights before it runs
end        the weights into which the optimizer shall write
discard    forget what has run ahead, as if the pipeline had been flushed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_bpipe.integration.patches.chunked_stage import ChunkedStage
from megatron_bpipe.integration.patches.flush_free.ahead import Ahead
from megatron_bpipe.integration.patches.stage import MegatronStage, StageCall
from megatron_bpipe.runtime.weight_versions import WeightVersions
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec
from megatron_bpipe.schedule.flush_free.plan import CallPlan, call_plan
from megatron_bpipe.schedule.ops import ActivationKey, Op
from megatron_bpipe.schedule.stage_plan import StagePlan

PlainStage = MegatronStage | ChunkedStage


@dataclass
class Pipeline:
    """What one stage holds from one call to the next.

    Args:
        spec: the schedule.
        stage: of ``spec.p``.
        versions: the stage's weights.
    """

    spec: ScheduleSpec
    stage: int
    versions: WeightVersions
    plan: CallPlan | None = None
    _ahead: Ahead = field(init=False)
    _number: int = 0
    _held: Any = None  # the stage of the call before, with what it carries

    def __post_init__(self) -> None:
        self._ahead = Ahead(self.spec.m)

    def begin(self, left: int) -> CallPlan:
        """A call begins, ``left`` calls before the pipeline is flushed."""
        self.plan = call_plan(self.spec, self.stage, self._number, left)
        self.versions.begin(self._number)
        return self.plan

    def given(self, call: StageCall) -> StageCall:
        """The call with its place among the iterations, and data that can be read again."""
        assert self.plan is not None
        readers = [self._ahead.reader(source) for source in call.data_iterators]
        return replace(call, data_iterators=readers, first=self.plan.first)

    def wrapped(self, stage: PlainStage) -> VersionedStage:
        """The stage of this call; takes over what the one before carries."""
        if self._held is not None:
            stage.go_on_from(self._held)
        self._held = stage
        return VersionedStage(stage, self.versions, self._ahead)

    def end(self) -> None:
        """All gradients of the iteration are there; the optimizer comes next."""
        assert self.plan is not None
        self.versions.advance(self.plan.oldest)
        self._ahead.over(self.plan.number)
        self._number += 1
        if self.plan.flushes:
            self._flushed()

    def discard(self) -> bool:
        """Forget what has run ahead; says whether there was anything."""
        if self._number == 0:
            return False
        self._ahead.undo()
        self.versions.forget()
        self._flushed()
        return True

    @property
    def stage_plan(self) -> StagePlan:
        """What this stage does in the call."""
        assert self.plan is not None
        return self.plan.stage

    @property
    def leaving(self) -> frozenset[ActivationKey]:
        """What is carried to a later call, and leaves only there."""
        return self.plan.leaving if self.plan is not None else frozenset()

    @property
    def flushes(self) -> bool:
        """Whether the pipeline is empty when the call ends."""
        return self.plan is None or self.plan.flushes

    @property
    def carries(self) -> bool:
        """Whether iterations have begun that are not over."""
        return self._number > 0

    def _flushed(self) -> None:
        self._number = 0
        self._held = None


@dataclass
class VersionedStage:
    """See `runtime.executor.Stage`: every op computes with the weights of its version."""

    stage: PlainStage
    versions: WeightVersions
    ahead: Ahead

    def exchange(self, ops: Sequence[Op]) -> None:
        """See `executor.Stage`."""
        self.stage.exchange(ops)

    def forward(self, op: Op) -> object:
        """F."""
        assert op.version is not None
        self.versions.use(op.version)
        self.ahead.before_forward(op.microbatch)
        return self.stage.forward(op)

    def backward(self, op: Op) -> None:
        """B."""
        assert op.version is not None
        self.versions.use(op.version)
        self.stage.backward(op)

    def weight(self, op: Op) -> None:
        """W: no schedule without a flush has one."""
        raise NotImplementedError
