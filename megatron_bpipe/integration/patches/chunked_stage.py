"""One pipeline stage of one or several model chunks, with messages posted by time label.

    exchange      P2PCommunicator.send_forward_recv_forward and send_backward_recv_backward,
                  asynchronous (Megatron's default with interleaving), or, with
                  --no-overlap-p2p-communication, one batched call of
                  send_forward_backward_recv_forward_backward
    F             schedules.forward_step
    B             schedules.backward_step
    W             weight_gradients.WeightGradients, what B left

An asynchronous receive is waited for directly before the computation that needs it; a send before
its output is given back, one computation later.  All stages post their messages in the order of
their labels, so nothing here can wait for a message that comes later (`schedule.lowering`).

Where an activation comes from and goes to is `schedule.lowering.routes`' answer.  Under the V
placement a micro-batch turns on stage p-1: what chunk 0 gave is chunk 1's input, without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bpipe.integration.checks.hook_points import BACKWARD_STEP
from megatron_bpipe.integration.checks.probe import call_known
from megatron_bpipe.integration.patches.chunk_sync import ChunkSync
from megatron_bpipe.integration.patches.split_backward.weight_gradients import WeightGradients
from megatron_bpipe.integration.patches.stage import StageCall
from megatron_bpipe.schedule.lowering.routes import downstream, upstream
from megatron_bpipe.schedule.ops import UP, ActivationKey, Kind, Op


@dataclass
class ChunkedStage:
    """See `runtime.executor.Stage`; holds the tensors between the ops of an activation.

    Args:
        call: what stays the same for the whole iteration.
        ops: what this stage runs.
        weights: weight gradients that B leaves to W; None where no W comes.
    """

    call: StageCall
    ops: Sequence[Op]
    weights: WeightGradients | None = None
    losses: list[Any] = field(default_factory=list)
    tokens: Any = None  # int tensor: non-padded tokens seen by this rank
    _inputs: dict[ActivationKey, Any] = field(default_factory=dict)
    _outputs: dict[ActivationKey, Any] = field(default_factory=dict)
    _gradients: dict[ActivationKey, Any] = field(default_factory=dict)  # of outputs, then of inputs
    _arriving: dict[tuple[Kind, ActivationKey], Any] = field(default_factory=dict)
    _sending: list[tuple[Any, Any]] = field(default_factory=list)  # handle, output or None
    _forwards: int = 0
    _fed: list[int] = field(default_factory=list)  # forwards of each model

    def __post_init__(self) -> None:
        self.tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        group = self.call.communicator.pp_group
        self._stage, self._p = group.rank(), group.size()
        self._known = {op.activation for op in self.ops if op.kind is Kind.FORWARD}
        self._trains = any(op.kind is Kind.BACKWARD for op in self.ops)
        # under V every stage's last backward of a chunk comes at a time of its own
        rank = 0 if self.call.mirror is not None else self._stage
        if self._trains:
            self._sync = ChunkSync(
                *(self.call.config, self.call.by_part, self.ops, rank), at_end=self.call.both_ways
            )
            self._warmup = _warmup(self.ops)
        self._fed = [0] * len(self.call.models)
        shapes = self.call.shapes[0]  # without interleaving Megatron has a list of one
        self._shape = shapes[0] if isinstance(shapes[0], (tuple, list)) else shapes

    def exchange(self, ops: Sequence[Op]) -> None:
        """See `executor.Stage`."""
        slots = {_slot(op): op for op in ops}
        assert len(slots) == len(ops), f"two messages one way: {[str(op) for op in ops]}"
        to_next, to_previous = slots.get("send_next"), slots.get("send_prev")
        sent_next, sent_previous = self._taken(to_next), self._taken(to_previous)
        from_previous, from_next = slots.get("recv_prev"), slots.get("recv_next")
        communicator, shape = self.call.communicator, self._shape
        if self.call.config.overlap_p2p_comm:
            if to_next or from_previous:
                received, handles = communicator.send_forward_recv_forward(
                    sent_next,
                    recv_prev=from_previous is not None,
                    tensor_shape=shape,
                    overlap_p2p_comm=True,
                )
                self._posted(from_previous, received, handles, "recv_prev")
                self._sent(handles, "send_next", to_next, sent_next)
            if to_previous or from_next:
                received, handles = communicator.send_backward_recv_backward(
                    sent_previous,
                    recv_next=from_next is not None,
                    tensor_shape=shape,
                    overlap_p2p_comm=True,
                )
                self._posted(from_next, received, handles, "recv_next")
                self._sent(handles, "send_prev", to_previous, sent_previous)
            return
        previous, following = communicator.send_forward_backward_recv_forward_backward(
            sent_next,
            sent_previous,
            recv_prev=from_previous is not None,
            recv_next=from_next is not None,
            tensor_shape=shape,
        )
        self._posted(from_previous, previous, None, "recv_prev")
        self._posted(from_next, following, None, "recv_next")
        for op, tensor in ((to_next, sent_next), (to_previous, sent_previous)):
            if op is not None and op.kind is Kind.SEND_FORWARD:
                self._release(tensor)

    def forward(self, op: Op) -> object:
        """F."""
        call, key = self.call, op.key
        if self._trains:
            self._sync.before_forward()
        self._arrived(Kind.FORWARD, key)
        index = call.model_of(op)
        place = self._fed[index] if call.both_ways else call.within(op)
        self._fed[index] += 1
        with call.seen_by(index):
            output, tokens = call.schedules.forward_step(
                forward_step_func=call.forward_step_func,
                data_iterator=call.data_iterators[index],
                model=call.models[index],
                num_microbatches=call.microbatches // call.ways,
                input_tensor=self._inputs.setdefault(key, None),
                forward_data_store=self.losses,
                config=call.config,
                cp_group_size=call.groups.cp.size(),
                collect_non_loss_data=call.collect_non_loss_data,
                checkpoint_activations_microbatch=self._checkpoint_all(),
                is_first_microbatch=place == 0,
                current_microbatch=place,
                vp_stage=call.virtual_stage(index),
                is_last_stage=call.ends_with(index),
            )
        self._forwards += 1
        self.tokens += tokens
        if self._trains:
            self._outputs[key] = output
        else:
            del self._inputs[key]
        self._settle()
        after = downstream((self._stage, op.activation), self._p, self._known)
        if after is not None and after[0] == self._stage:
            self._turn(ActivationKey(*after[1]), output)
        elif after is not None:
            self._outputs[key] = output
        return output

    def backward(self, op: Op) -> None:
        """B."""
        call, key = self.call, op.key
        self._sync.before_backward(op.chunk)
        self._arrived(Kind.BACKWARD, key)
        if any(sent is self._outputs[key] for _, sent in self._sending):
            self._settle()  # nothing was computed since it was sent; its gradient is here already
        left = nullcontext() if self.weights is None else self.weights.left_by(key)
        with call.seen_by(call.model_of(op)), left:
            gradient = call_known(
                BACKWARD_STEP,
                call.schedules.backward_step,
                input_tensor=self._inputs.pop(key),
                output_tensor=self._outputs.pop(key),
                output_tensor_grad=self._gradients.pop(key, None),
                model_type=getattr(call.model, "model_type", None),
                config=call.config,
            )
        before = upstream((self._stage, op.activation), self._p, self._known)
        if before is not None:  # else it is where the micro-batch entered the model
            turned = before[0] == self._stage
            self._gradients[ActivationKey(*before[1]) if turned else key] = gradient
        self._sync.after_backward()
        self._settle()

    def weight(self, op: Op) -> None:
        """W."""
        assert self.weights is not None
        self.weights.compute(op.key)
        self._settle()

    def _turn(self, key: ActivationKey, output: Any) -> None:
        """One chunk's output as the next one's input on the same stage, as if it had been sent."""
        tensor = output[0] if isinstance(output, list) else output
        self._inputs[key] = tensor.detach().requires_grad_(tensor.requires_grad)
        self._release(tensor)

    def go_on_from(self, earlier: ChunkedStage) -> None:
        """Take over the micro-batches of an earlier call that have not had their backward."""
        self._inputs, self._outputs = earlier._inputs, earlier._outputs
        self._gradients = earlier._gradients

    def finish(self) -> None:
        """All ops have run: no message is under way, all gradients are reduced."""
        self._settle()
        if self._trains:
            self._sync.finish()

    def _taken(self, op: Op | None) -> Any:
        """What this message sends, None if there is none."""
        if op is None:
            return None
        if op.kind is Kind.SEND_BACKWARD:
            found = self._gradients.pop(op.key)
        else:
            found = self._outputs[op.key] if self._trains else self._outputs.pop(op.key)
        return found[0] if isinstance(found, list) else found

    def _posted(self, op: Op | None, received: Any, handles: Any, name: str) -> None:
        if op is None:
            return
        forward = op.kind is Kind.RECV_FORWARD
        (self._inputs if forward else self._gradients)[op.key] = received
        if handles:
            self._arriving[Kind.FORWARD if forward else Kind.BACKWARD, op.key] = handles[name]

    def _arrived(self, kind: Kind, key: ActivationKey) -> None:
        handle = self._arriving.pop((kind, key), None)
        if handle is not None:
            handle.wait()

    def _sent(self, handles: Any, name: str, op: Op | None, tensor: Any) -> None:
        handle = handles.get(name) if handles else None
        if handle is not None:
            output = tensor if op is not None and op.kind is Kind.SEND_FORWARD else None
            self._sending.append((handle, output))

    def _settle(self) -> None:
        """Wait for the sends posted before the computation that has just run."""
        for handle, output in self._sending:
            handle.wait()
            self._release(output)
        self._sending.clear()

    def _release(self, output: Any) -> None:
        """Once sent, an output's data is needed no more, only its graph."""
        self.call.schedules.deallocate_output_tensor(
            output, self.call.config.deallocate_pipeline_outputs
        )

    def _checkpoint_all(self) -> bool | None:
        """Whether this forward recomputes all layers (arXiv 2205.05198, appendix C)."""
        partial = self.call.config.num_microbatches_with_partial_activation_checkpoints
        if partial is None or not self._trains:
            return None
        return bool(self._forwards % (self._warmup + 1) >= partial)


def _slot(op: Op) -> str:
    """Which of a stage's four messages of one exchange this is, by Megatron's names."""
    sends = op.kind is Kind.SEND_FORWARD or op.kind is Kind.SEND_BACKWARD
    onwards = (op.kind is Kind.SEND_FORWARD or op.kind is Kind.RECV_BACKWARD) is not (
        op.direction is UP
    )
    if sends:
        return "send_next" if onwards else "send_prev"
    return "recv_next" if onwards else "recv_prev"


def _warmup(ops: Sequence[Op]) -> int:
    """Forwards before the stage alternates: all but the one directly before the first backward."""
    kinds = [op.kind for op in ops if op.kind in (Kind.FORWARD, Kind.BACKWARD)]
    leading = kinds.index(Kind.BACKWARD)
    return leading if leading == kinds.count(Kind.FORWARD) else leading - 1
