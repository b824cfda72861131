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
from megatron_bpipe.integration.patches.stage import StageCall
from megatron_bpipe.integration.patches.weight_gradients import WeightGradients
from megatron_bpipe.schedule.ops import ActivationKey, Kind, Op


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

    def __post_init__(self) -> None:
        self.tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        rank = self.call.communicator.pp_group.rank()
        self._sync = ChunkSync(self.call.config, self.call.models, self.ops, rank)
        self._warmup = _warmup(self.ops)
        shapes = self.call.shapes[0]  # without interleaving Megatron has a list of one
        self._shape = shapes[0] if isinstance(shapes[0], (tuple, list)) else shapes

    def exchange(self, ops: Sequence[Op]) -> None:
        """See `executor.Stage`."""
        by_kind = {op.kind: op.key for op in ops}
        assert len(by_kind) == len(ops), f"two messages of one kind: {[str(op) for op in ops]}"
        output = self._taken(by_kind, Kind.SEND_FORWARD, self._outputs, keep=True)
        gradient = self._taken(by_kind, Kind.SEND_BACKWARD, self._gradients, keep=False)
        from_previous = Kind.RECV_FORWARD in by_kind
        from_next = Kind.RECV_BACKWARD in by_kind
        communicator, shape = self.call.communicator, self._shape
        if self.call.config.overlap_p2p_comm:
            if output is not None or from_previous:
                received, handles = communicator.send_forward_recv_forward(
                    output, recv_prev=from_previous, tensor_shape=shape, overlap_p2p_comm=True
                )
                self._posted(by_kind.get(Kind.RECV_FORWARD), received, handles, "recv_prev")
                self._sent(handles, "send_next", output)
            if gradient is not None or from_next:
                received, handles = communicator.send_backward_recv_backward(
                    gradient, recv_next=from_next, tensor_shape=shape, overlap_p2p_comm=True
                )
                self._posted(by_kind.get(Kind.RECV_BACKWARD), received, handles, "recv_next")
                self._sent(handles, "send_prev", None)
            return
        forward, backward = communicator.send_forward_backward_recv_forward_backward(
            output, gradient, recv_prev=from_previous, recv_next=from_next, tensor_shape=shape
        )
        self._posted(by_kind.get(Kind.RECV_FORWARD), forward, None, "recv_prev")
        self._posted(by_kind.get(Kind.RECV_BACKWARD), backward, None, "recv_next")
        self._release(output)

    def forward(self, op: Op) -> object:
        """F."""
        call, key = self.call, op.key
        self._sync.before_forward()
        self._arrived(Kind.FORWARD, key)
        chunk = op.chunk
        output, tokens = call.schedules.forward_step(
            forward_step_func=call.forward_step_func,
            data_iterator=call.data_iterators[chunk],
            model=call.models[chunk],
            num_microbatches=call.microbatches,
            input_tensor=self._inputs.setdefault(key, None),
            forward_data_store=self.losses,
            config=call.config,
            cp_group_size=call.groups.cp.size(),
            collect_non_loss_data=call.collect_non_loss_data,
            checkpoint_activations_microbatch=self._checkpoint_all(),
            is_first_microbatch=op.microbatch == 0,
            current_microbatch=op.microbatch,
            vp_stage=chunk if len(call.models) > 1 else None,
            is_last_stage=call.is_last and chunk == len(call.models) - 1,
        )
        self._forwards += 1
        self.tokens += tokens
        self._outputs[key] = output
        self._settle()
        return output

    def backward(self, op: Op) -> None:
        """B."""
        call, key = self.call, op.key
        self._sync.before_backward(op.chunk)
        self._arrived(Kind.BACKWARD, key)
        with nullcontext() if self.weights is None else self.weights.left_by(key):
            self._gradients[key] = call_known(
                BACKWARD_STEP,
                call.schedules.backward_step,
                input_tensor=self._inputs.pop(key),
                output_tensor=self._outputs.pop(key),
                output_tensor_grad=self._gradients.pop(key, None),
                model_type=getattr(call.model, "model_type", None),
                config=call.config,
            )
        if call.is_first and not op.chunk:  # where the micro-batch entered the model
            del self._gradients[key]
        self._sync.after_backward()
        self._settle()

    def weight(self, op: Op) -> None:
        """W."""
        assert self.weights is not None
        self.weights.compute(op.key)
        self._settle()

    def finish(self) -> None:
        """All ops have run: no message is under way, all gradients are reduced."""
        self._settle()
        self._sync.finish()

    def _taken(
        self,
        by_kind: dict[Kind, ActivationKey],
        kind: Kind,
        held: dict[ActivationKey, Any],
        *,
        keep: bool,
    ) -> Any:
        """What a send of this kind sends, None if there is none."""
        if kind not in by_kind:
            return None
        found = held[by_kind[kind]] if keep else held.pop(by_kind[kind])
        return found[0] if isinstance(found, list) else found

    def _posted(self, key: ActivationKey | None, received: Any, handles: Any, name: str) -> None:
        if key is None:
            return
        forward = name == "recv_prev"
        (self._inputs if forward else self._gradients)[key] = received
        if handles:
            self._arriving[Kind.FORWARD if forward else Kind.BACKWARD, key] = handles[name]

    def _arrived(self, kind: Kind, key: ActivationKey) -> None:
        handle = self._arriving.pop((kind, key), None)
        if handle is not None:
            handle.wait()

    def _sent(self, handles: Any, name: str, output: Any) -> None:
        handle = handles.get(name) if handles else None
        if handle is not None:
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
        if partial is None:
            return None
        return bool(self._forwards % (self._warmup + 1) >= partial)


def _warmup(ops: Sequence[Op]) -> int:
    """Forwards before the stage alternates: all but the one directly before the first backward."""
    kinds = [op.kind for op in ops if op.kind in (Kind.FORWARD, Kind.BACKWARD)]
    leading = kinds.index(Kind.BACKWARD)
    return leading if leading == kinds.count(Kind.FORWARD) else leading - 1
