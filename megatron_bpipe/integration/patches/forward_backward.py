"""What stands in for Megatron's ``forward_backward_pipelining_without_interleaving``.

    schedule -> MegatronStage -> executor.Run -> gradients finalised, as Megatron does

Megatron's own body is not copied: everything that computes or communicates is its helpers.
Evaluation (``forward_only``) holds no activations, so it goes to Megatron's own function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_bpipe.integration.checks.arguments import incompatible_flags
from megatron_bpipe.integration.link_forecast import forward_flops
from megatron_bpipe.integration.patches.p2p_sync import StreamWaits, host_waits
from megatron_bpipe.integration.patches.process_groups import GROUPS_NAMES, default_groups
from megatron_bpipe.integration.patches.stage import MegatronStage, StageCall
from megatron_bpipe.integration.session import Session
from megatron_bpipe.runtime.executor import Run
from megatron_bpipe.schedule.stage_plan import stage_plan


def make_schedule(
    stock: Callable[..., Any], schedules: Any, session: Session
) -> Callable[..., Any]:
    """The function that replaces ``stock`` in Megatron's module ``schedules``."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)  # callers look at its signature
    def forward_backward_bpipe(**named: Any) -> Any:
        """Run the forward and backward passes of one iteration under BPipe."""
        bound = signature.bind(**named)
        bound.apply_defaults()
        arguments = bound.arguments
        if arguments["forward_only"]:
            return stock(**named)
        call = _stage_call(schedules, arguments)
        group = call.communicator.pp_group
        plan = stage_plan(group.size(), call.microbatches, group.rank(), session.options.budget)
        session.begin(plan, group, call.model, _flops_of(call, arguments))
        _timer(call.config, start=True)
        embedding = schedules.clear_embedding_activation_buffer(
            config=call.config,
            model=call.model,
            is_last_stage=call.is_last,
        )
        if plan.slots_borrowed or plan.slots_lent:
            waits = host_waits(group, clocked=session.options.clocked)
            call = replace(call, communicator=StreamWaits(call.communicator, host=waits))
        stage = MegatronStage(call)
        store, acceptor_end = session.store_for(plan), session.acceptor_end
        name = f"rank {torch.distributed.get_rank()} (stage {group.rank()} of {group.size()})"
        ranges = torch.cuda.nvtx.range if torch.cuda.is_available() else None
        Run(plan.ops, stage, store, acceptor_end, session.observers(), name, ranges).run()
        _finish_gradients(call, stage, embedding, arguments)
        _timer(call.config, start=False)
        session.end(stage.losses)
        return stage.losses

    return forward_backward_bpipe


def _stage_call(schedules: Any, arguments: dict[str, Any]) -> StageCall:
    model = _only(arguments["model"], "model chunk")
    config = schedules.get_model_config(model)
    if config.overlap_p2p_comm:
        raise ValueError(
            "bpipe: overlap_p2p_comm needs interleaving; use --no-overlap-p2p-communication"
        )
    for flag, given, remedy in incompatible_flags(config):  # a loop without Megatron's parser
        raise ValueError(f"bpipe: cannot run with {flag} {given}; {remedy}")
    communicator = arguments["p2p_communicator"]
    groups_name = next(name for name in GROUPS_NAMES if name in arguments)
    groups = arguments[groups_name]
    if (communicator is None) != (groups is None):
        raise ValueError(f"bpipe: pass both p2p_communicator and {groups_name}, or neither")
    if communicator is None:
        communicator = schedules.P2PCommunicator(
            pp_group=schedules.parallel_state.get_pipeline_model_parallel_group(), config=config
        )
        groups = default_groups(schedules)
    elif not (
        hasattr(communicator, "pp_group") and hasattr(groups, "tp") and hasattr(groups, "cp")
    ):
        raise ValueError("bpipe: a pipeline of several modules has no pairs; run it without bpipe")
    return StageCall(
        schedules=schedules,
        config=config,
        model=model,
        communicator=communicator,
        groups=groups,
        groups_name=groups_name,
        forward_step_func=arguments["forward_step_func"],
        data_iterator=_only(arguments["data_iterator"], "data iterator"),
        microbatches=arguments["num_microbatches"],
        shapes=_shapes(schedules, config, groups, arguments),
        collect_non_loss_data=arguments["collect_non_loss_data"],
    )


def _only(value: Any, what: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"bpipe: got {len(value)} times a {what}; without interleaving it is one")
    return value[0]


def _shapes(schedules: Any, config: Any, groups: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    def shapes() -> Any:
        return schedules.get_tensor_shapes(
            seq_length=arguments["seq_length"],
            micro_batch_size=arguments["micro_batch_size"],
            decoder_seq_length=arguments["decoder_seq_length"],
            config=config,
            tp_group=groups.tp,
            cp_group=groups.cp,
        )

    received, sent = shapes(), shapes()
    adjust = arguments["adjust_tensor_shapes_fn"]
    return adjust(received, sent) if adjust is not None else (received, sent)


def _flops_of(call: StageCall, arguments: dict[str, Any]) -> Callable[[], float | None]:
    """What gives the FLOPs of one micro-batch's forward; asked for once, if at all."""
    return functools.partial(
        forward_flops,
        call.config,
        arguments["seq_length"],
        arguments["micro_batch_size"],
        call.groups,
        call.communicator.pp_group.size(),
    )


def _finish_gradients(
    call: StageCall, stage: MegatronStage, embedding: Any, arguments: dict[str, Any]
) -> None:
    config = call.config
    if stage.enable_grad_sync() and config.grad_sync_func is not None:
        config.grad_sync_func(call.model.parameters())
    if config.finalize_model_grads_func is None:
        return
    call.schedules.finish_embedding_wgrad_compute(
        config=config,
        embedding_module=embedding,
        is_last_stage=call.is_last,
        tp_group=call.groups.tp,
    )
    named = {call.groups_name: call.groups}
    if "force_all_reduce" in arguments:
        named["force_all_reduce"] = arguments["force_all_reduce"]
    config.finalize_model_grads_func(
        [call.model],
        stage.tokens if config.calculate_per_token_loss else None,
        **named,
    )


def _timer(config: Any, *, start: bool) -> None:
    if config.timers is None:
        return
    timer = config.timers("forward-backward", log_level=1)
    if start:
        timer.start(barrier=config.barrier_with_L1_time)
    else:
        timer.stop()
