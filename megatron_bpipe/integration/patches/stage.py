"""One pipeline stage, through Megatron's own helpers.

    RF SF RB SB   P2PCommunicator.recv_forward, send_forward, ...
    F             schedules.forward_step
    B             schedules.backward_step

What the helpers need beside the micro-batch's number (shapes, groups, the rule for partial
activation checkpointing) is worked out once per iteration, in `StageCall`. Where the signature of a
helper differs between releases, `checks/hook_points.py` says how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bpipe.integration.checks.hook_points import BACKWARD_STEP
from megatron_bpipe.integration.checks.probe import call_known
from megatron_bpipe.integration.patches.v_placement.mirror import Mirror
from megatron_bpipe.schedule.ops import UP, Kind, Op


@dataclass
class StageCall:
    """What stays the same for all micro-batches of one iteration.

    ``schedules`` is Megatron's module: its functions are looked up at each call, so that whoever
    else wraps them is still heard.
    """

    schedules: Any
    config: Any
    models: Sequence[Any]  # the stage's chunks; one without interleaving; two both ways
    communicator: Any
    groups: Any  # of processes: a collection with tp, cp, pp ...
    groups_name: str  # the parameter by which this release passes them
    forward_step_func: Callable[..., Any]
    data_iterators: Sequence[Any]  # one for each chunk
    microbatches: int
    shapes: tuple[Any, Any]  # of what is received and of what is sent, forward
    collect_non_loss_data: bool
    mirror: Mirror | None = None  # where a model's stage is not the rank's
    both_ways: bool = False  # a second pipeline goes up, with a model of its own
    first: int = 0  # number of the iteration's first micro-batch: iterations go on without a flush

    @property
    def has_head(self) -> bool:
        """Whether a model ends on this stage."""
        return any(self.ends_with(index) for index in range(len(self.models)))

    @property
    def ways(self) -> int:
        """Pipelines that share the micro-batches of an iteration."""
        return 2 if self.both_ways else 1

    def model_of(self, op: Op) -> int:
        """Which of this stage's models an op is about."""
        return int(op.direction is UP) if self.both_ways else op.chunk

    def ends_with(self, index: int) -> bool:
        """Whether this one of the stage's models has the head."""
        if self.both_ways:
            return self.is_first if index else self.is_last
        head_here = self.is_last if self.mirror is None else self.is_first
        return head_here and index == len(self.models) - 1

    def virtual_stage(self, index: int) -> int | None:
        """Megatron's number of a model chunk, None where a pipeline has one on a stage."""
        return index if len(self.models) > self.ways else None

    @property
    def by_part(self) -> list[Any]:
        """The models in an order on which stages that share their gradients agree."""
        group = self.communicator.pp_group
        mirrored = self.both_ways and group.rank() > group.size() - 1 - group.rank()
        return list(reversed(self.models)) if mirrored else list(self.models)

    def seen_by(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Within this, Megatron's questions about the stage are answered for this model."""
        return contextlib.nullcontext() if self.mirror is None else self.mirror.seen_by(index)

    def within(self, op: Op) -> int:
        """The place of an op's micro-batch in its own iteration."""
        return (op.microbatch - self.first) % self.microbatches

    @property
    def model(self) -> Any:
        """The only chunk, or the first."""
        return self.models[0]

    @property
    def is_first(self) -> bool:
        """Whether this is stage 0."""
        return bool(self.communicator.pp_group.rank() == 0)

    @property
    def is_last(self) -> bool:
        """Whether this is stage p-1."""
        group = self.communicator.pp_group
        return bool(group.rank() == group.size() - 1)


@dataclass
class MegatronStage:
    """See `runtime.executor.Stage`; holds the tensors between the ops of a micro-batch."""

    call: StageCall
    losses: list[Any] = field(default_factory=list)
    tokens: Any = None  # int tensor: non-padded tokens seen by this rank
    _inputs: dict[int, Any] = field(default_factory=dict)
    _outputs: dict[int, Any] = field(default_factory=dict)
    _gradients: dict[int, Any] = field(default_factory=dict)  # of outputs, then of inputs
    _no_sync: Any = None
    _window: int | None = None

    def __post_init__(self) -> None:
        call = self.call
        self.tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        if call.config.num_microbatches_with_partial_activation_checkpoints is not None:
            group = call.communicator.pp_group
            ahead = group.size() - group.rank() - 1
            self._window = min(ahead, call.microbatches) + 1
        self._no_sync = (call.config.no_sync_func or contextlib.nullcontext)()
        self._no_sync.__enter__()

    def exchange(self, ops: Sequence[Op]) -> None:
        """One message, or a send with the receive from the same neighbour."""
        call, communicator, first = self.call, self.call.communicator, ops[0]
        i, kinds = first.microbatch, tuple(op.kind for op in ops)
        if kinds == (Kind.RECV_FORWARD,):
            self._inputs[i] = communicator.recv_forward(call.shapes[0], call.is_first)
        elif kinds == (Kind.RECV_BACKWARD,):
            self._gradients[i] = communicator.recv_backward(call.shapes[1], call.is_last)
        elif kinds == (Kind.SEND_FORWARD,):
            communicator.send_forward(self._outputs[i], call.is_last)
            self._sent(i)
        elif kinds == (Kind.SEND_BACKWARD,):
            communicator.send_backward(self._gradients.pop(i), call.is_first)
        elif kinds == (Kind.SEND_FORWARD, Kind.RECV_BACKWARD):
            self._gradients[ops[1].microbatch] = communicator.send_forward_recv_backward(
                self._outputs[i], call.shapes[1], call.is_last
            )
            self._sent(i)
        else:
            assert kinds == (Kind.SEND_BACKWARD, Kind.RECV_FORWARD), kinds
            self._inputs[ops[1].microbatch] = communicator.send_backward_recv_forward(
                self._gradients.pop(i), call.shapes[0], call.is_first
            )

    def forward(self, op: Op) -> object:
        """F."""
        call, i = self.call, op.microbatch
        if call.is_first:  # no message comes in, but the helpers expect its empty shape
            self._inputs[i] = call.communicator.recv_forward(call.shapes[0], call.is_first)
        output, tokens = call.schedules.forward_step(
            forward_step_func=call.forward_step_func,
            data_iterator=call.data_iterators[0],
            model=call.model,
            num_microbatches=call.microbatches,
            input_tensor=self._inputs[i],
            forward_data_store=self.losses,
            config=call.config,
            cp_group_size=call.groups.cp.size(),
            collect_non_loss_data=call.collect_non_loss_data,
            checkpoint_activations_microbatch=self._checkpoint_all(i),
            is_first_microbatch=call.within(op) == 0,
            current_microbatch=call.within(op),
            is_last_stage=call.is_last,
        )
        self.tokens += tokens
        self._outputs[i] = output
        if call.is_last:
            self._sent(i)
        return output

    def backward(self, op: Op) -> None:
        """B."""
        call, i = self.call, op.microbatch
        last = call.within(op) == call.microbatches - 1
        if last and (call.config.grad_sync_func is None or call.is_first):
            self._enable_grad_sync()
        if call.is_last:
            self._gradients[i] = call.communicator.recv_backward(call.shapes[1], call.is_last)
        self._gradients[i] = call_known(
            BACKWARD_STEP,
            call.schedules.backward_step,
            input_tensor=self._inputs.pop(i),
            output_tensor=self._outputs.pop(i),
            output_tensor_grad=self._gradients.pop(i),
            model_type=getattr(call.model, "model_type", None),
            config=call.config,
        )
        if call.is_first:
            del self._gradients[i]

    def weight(self, op: Op) -> None:
        """W: no schedule in 1F1B's order has one, those that do have time labels."""
        raise NotImplementedError

    def go_on_from(self, earlier: MegatronStage) -> None:
        """Take over the micro-batches of an earlier call that have not had their backward."""
        self._inputs, self._outputs = earlier._inputs, earlier._outputs
        self._gradients = earlier._gradients

    def finish(self) -> None:
        """All ops have run: reduce all gradients."""
        if self._enable_grad_sync() and self.call.config.grad_sync_func is not None:
            self.call.config.grad_sync_func(self.call.model.parameters())

    def _enable_grad_sync(self) -> bool:
        """Let gradients be reduced from here on; False if they already were."""
        if self._no_sync is None:
            return False
        self._no_sync.__exit__(None, None, None)
        self._no_sync = None
        return True

    def _sent(self, microbatch: int) -> None:
        """Once sent, an output's data is needed no more, only its graph."""
        outputs = self._outputs[microbatch]
        for output in outputs if isinstance(outputs, list) else [outputs]:
            self.call.schedules.deallocate_output_tensor(
                output, self.call.config.deallocate_pipeline_outputs
            )

    def _checkpoint_all(self, microbatch: int) -> bool | None:
        """Whether this micro-batch recomputes all layers (arXiv 2205.05198, appendix C)."""
        partial = self.call.config.num_microbatches_with_partial_activation_checkpoints
        if self._window is None:
            return None
        return bool(microbatch % self._window >= partial)
