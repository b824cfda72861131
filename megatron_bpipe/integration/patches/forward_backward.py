"""What stands in for Megatron's ``forward_backward_pipelining_with(out)_interleaving``.

    stage_plan -> a stage -> executor.ScheduleExecutor -> gradients finalised, as Megatron does

A stage is a `MegatronStage` where messages have no time labels (1F1B, message for message what
Megatron sends), else a `ChunkedStage`.

Megatron's own body is not copied: everything that computes or communicates is its helpers.
Evaluation (``forward_only``) holds no activations, so it goes to Megatron's own function, unless
the chunks are placed as that function does not know (`v_placement`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from megatron_bpipe.integration.checks.arguments import incompatible_flags
from megatron_bpipe.integration.checks.schedule import both_ways, schedule_name
from megatron_bpipe.integration.link_forecast import forward_flops
from megatron_bpipe.integration.options import Options
from megatron_bpipe.integration.patches.chimera.losses import of_both_ends, tokens_of_both
from megatron_bpipe.integration.patches.chunked_stage import ChunkedStage
from megatron_bpipe.integration.patches.flush_free.pipeline import Pipeline
from megatron_bpipe.integration.patches.flush_free.run import pipeline_of
from megatron_bpipe.integration.patches.p2p_sync import StreamWaits, host_waits
from megatron_bpipe.integration.patches.process_groups import GROUPS_NAMES, default_groups
from megatron_bpipe.integration.patches.split_backward.weight_gradients import WeightGradients
from megatron_bpipe.integration.patches.stage import MegatronStage, StageCall
from megatron_bpipe.integration.patches.v_placement.losses import (
    at_the_last_stage,
    tokens_everywhere,
)
from megatron_bpipe.integration.session import Session
from megatron_bpipe.integration.stage_pools import sizes_vary
from megatron_bpipe.runtime.executor import ScheduleExecutor
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec
from megatron_bpipe.schedule.ops import Op
from megatron_bpipe.schedule.stage_plan import StagePlan, forward_ops, stage_plan


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
        if arguments["forward_only"] and session.mirror is None:
            session.flush()
            return stock(**named)
        call = _stage_call(schedules, arguments, session)
        group = call.communicator.pp_group
        spec = _spec(call, session.options)
        session.recompute(call.config, group.rank())
        if arguments["forward_only"]:
            return _evaluated(call, forward_ops(spec, group.rank()))
        try:
            pipeline = pipeline_of(session, spec, group, call.models)
            if pipeline is None:
                plan = stage_plan(session.arranged(spec, group), group.rank())
            else:
                plan, call = pipeline.stage_plan, pipeline.given(call)
            flops, vary = _flops_of(call, arguments), sizes_vary(call.config)
            session.begin(plan, group, call.models, flops, vary)
            losses = _iteration(call, plan, session, arguments, pipeline)
            session.end(losses)
        except BaseException as error:
            session.failed(error)
            raise
        return losses

    return forward_backward_bpipe


def _evaluated(call: StageCall, ops: Sequence[Op]) -> list[Any]:
    """Forwards alone, where Megatron's own function does not know the placement."""
    stage = ChunkedStage(call, ops)
    ScheduleExecutor(ops, stage).run()
    stage.finish()
    return _where_megatron_looks(call, stage.losses)


def _iteration(
    call: StageCall,
    plan: StagePlan,
    session: Session,
    arguments: dict[str, Any],
    pipeline: Pipeline | None,
) -> list[Any]:
    group = call.communicator.pp_group
    _timer(call.config, start=True)
    embedding = call.schedules.clear_embedding_activation_buffer(
        config=call.config,
        model=_as_given(call),
        is_last_stage=call.has_head,
    )
    if plan.slots_borrowed or plan.slots_lent:
        waits = host_waits(group, clocked=session.options.clocked)
        call = replace(call, communicator=StreamWaits(call.communicator, host=waits))
    recorder = session.recorder
    on_left = recorder.left_for_weight if recorder is not None else None
    weights = WeightGradients(call.models, on_left) if plan.splits_backward else None
    plain = ChunkedStage(call, plan.ops, weights) if plan.labelled else MegatronStage(call)
    stage = plain if pipeline is None else pipeline.wrapped(plain)
    store = session.store if plan.slots_borrowed else None
    lent = session.acceptor_end if plan.slots_lent else None
    name = f"rank {torch.distributed.get_rank()} (stage {group.rank()} of {group.size()})"
    ranges = torch.cuda.nvtx.range if torch.cuda.is_available() else None
    executor = ScheduleExecutor(
        *(plan.ops, stage, store, lent, session.observers(), name, ranges),
        ends_empty=pipeline is None or pipeline.flushes,
        leaving=() if pipeline is None else pipeline.leaving,
    )
    with weights.deferred() if weights is not None else nullcontext():
        executor.run()
    plain.finish()
    losses = _where_megatron_looks(call, plain.losses)
    if call.both_ways:
        tokens_of_both(plain.tokens, group)
    elif call.mirror is not None:
        tokens_everywhere(plain.tokens, group)
    _finish_gradients(call, plain.tokens, embedding, arguments)
    if pipeline is not None:
        pipeline.end()
    _timer(call.config, start=False)
    return losses


def _where_megatron_looks(call: StageCall, losses: list[Any]) -> list[Any]:
    """The losses of an iteration on stage p-1, wherever they were made."""
    group = call.communicator.pp_group
    if call.both_ways:
        return of_both_ends(losses, group, collected=call.collect_non_loss_data)
    return losses if call.mirror is None else at_the_last_stage(losses, group)


def _spec(call: StageCall, options: Options) -> ScheduleSpec:
    """The schedule of this call: the user's, or Megatron's own for this number of chunks."""
    chunks = len(call.models) // call.ways
    return ScheduleSpec(
        name=schedule_name(options.schedule, chunks),
        p=call.communicator.pp_group.size(),
        m=call.microbatches,
        chunks=chunks,
        group=call.config.microbatch_group_size_per_vp_stage if chunks > 1 else None,
        balanced=options.bpipe,
        budget=options.budget,
        parts=options.in_parts,
    )


def _stage_call(schedules: Any, arguments: dict[str, Any], session: Session) -> StageCall:
    models = _as_list(arguments["model"])
    config = schedules.get_model_config(models[0])
    if config.overlap_p2p_comm and len(models) == 1:
        raise ValueError(
            "bpipe: overlap_p2p_comm needs interleaving; use --no-overlap-p2p-communication"
        )
    if both_ways(session.options.schedule) and len(models) != 2:
        raise ValueError(
            f"bpipe: got {len(models)} model(s) a stage, but {session.options.schedule} has one "
            "for each direction; use Megatron's training loop, which builds both"
        )
    iterators = _as_list(arguments["data_iterator"])
    if len(iterators) != len(models):
        raise ValueError(
            f"bpipe: got {len(iterators)} data iterators for {len(models)} model chunks; give one "
            "for each"
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
        models=models,
        communicator=communicator,
        groups=groups,
        groups_name=groups_name,
        forward_step_func=arguments["forward_step_func"],
        data_iterators=iterators,
        microbatches=arguments["num_microbatches"],
        shapes=(
            _one_shape(config, groups, arguments)
            if len(models) > 1
            else _shapes(schedules, config, groups, arguments)
        ),
        collect_non_loss_data=arguments["collect_non_loss_data"],
        mirror=session.mirror,
        both_ways=both_ways(session.options.schedule),
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_given(call: StageCall) -> Any:
    """The model as Megatron's helpers take it: a list only if there are several chunks."""
    return list(call.models) if len(call.models) > 1 else call.model


def _one_shape(config: Any, groups: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The one shape of all messages of an interleaved pipeline."""
    if arguments["adjust_tensor_shapes_fn"] is not None:
        raise ValueError(
            "bpipe: Megatron has no adjust_tensor_shapes_fn with interleaving; leave it out"
        )
    seq = arguments["seq_length"] // groups.cp.size()
    if config.sequence_parallel:
        seq //= groups.tp.size()
    shape = [seq, arguments["micro_batch_size"], config.hidden_size]
    return shape, shape


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
    call: StageCall, tokens: Any, embedding: Any, arguments: dict[str, Any]
) -> None:
    config = call.config
    if config.finalize_model_grads_func is None:
        return
    call.schedules.finish_embedding_wgrad_compute(
        config=config,
        embedding_module=embedding,
        is_last_stage=call.has_head,
        tp_group=call.groups.tp,
    )
    named = {call.groups_name: call.groups}
    if "force_all_reduce" in arguments:
        named["force_all_reduce"] = arguments["force_all_reduce"]
    config.finalize_model_grads_func(
        call.by_part,
        tokens if config.calculate_per_token_loss else None,
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
