"""``plan``: parallel sizes, partition, schedule and memory saving for a model on a cluster."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.parameters import model_parameters
from megatron_bpipe.estimate.models import Model, model_named
from megatron_bpipe.estimate.paper.calibration import outside_calibration
from megatron_bpipe.estimate.paper.tables import published_cases
from megatron_bpipe.estimate.profile import read_profile
from megatron_bpipe.estimate.quantities import UnitError, size
from megatron_bpipe.estimate.runs import Attention
from megatron_bpipe.estimate.time.kernels.fused_softmax_rules import softmax_trap
from megatron_bpipe.placement import PlacementError
from megatron_bpipe.planner.check.show import check_text
from megatron_bpipe.planner.evaluate import Predictor
from megatron_bpipe.planner.inputs.cluster import Cluster, preset, read_cluster
from megatron_bpipe.planner.inputs.flags import Asked, read_flags
from megatron_bpipe.planner.inputs.hugging_face import read_config
from megatron_bpipe.planner.inputs.sources import from_layer_model, from_profile, from_table_5
from megatron_bpipe.planner.measured import read_report
from megatron_bpipe.planner.output import show_measured
from megatron_bpipe.planner.output.advice import BALANCED, advice, gain_of_bpipe
from megatron_bpipe.planner.output.command import command_text
from megatron_bpipe.planner.output.megatron_flags import model_flags
from megatron_bpipe.planner.output.show import (
    fallen_out,
    memory_line,
    plan_data,
    plans_table,
    too_large_data,
)
from megatron_bpipe.planner.search import Found, Plan, Progress, search
from megatron_bpipe.planner.space import Question
from megatron_bpipe.planner.uncertainty import KNOWN, Uncertainty, uncertainty
from megatron_bpipe.planner.ways import ways_of_schedule
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE

TRIAL = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "20")
"""Beside a model without data: enough for Megatron to start."""


@dataclass(frozen=True)
class _Task:
    """What the arguments ask for."""

    question: Question
    predictor: Predictor
    asked: Asked
    source: str
    unsure: Uncertainty


def run(args: argparse.Namespace) -> int:
    """Plan and print; 1 where nothing fits, 2 after one line on stderr if that is not possible."""
    try:
        if args.check:
            print(check_text(as_json=args.json))
            return 0
        if args.from_report is not None:
            print(_measured(args))
            return 0
        task = _task(args)
        start = time.perf_counter()
        found = search(task.question, task.predictor, _progress())
        took = time.perf_counter() - start
        print(_json(args, task, found) if args.json else _text(args, task, found, took))
        return 0 if found.best else 1
    except (EstimateError, PlacementError, UnitError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _measured(args: argparse.Namespace) -> str:
    """What a run's report says."""
    if args.microbatches is not None and args.microbatches < 1:
        raise EstimateError(f"--microbatches {args.microbatches}: give at least 1")
    found = read_report(args.from_report)
    capacity = show_measured.capacity_of(found, size(args.memory) if args.memory else None)
    if args.json:
        return json.dumps(show_measured.data(found, capacity, args.microbatches), indent=2)
    return show_measured.text(found, capacity, args.microbatches)


def _progress() -> Progress:
    """Reports to standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        return lambda number, best: None
    last = 0.0

    def report(number: int, best: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.5:
            return
        last = now
        found = "" if best is None else f", best so far {best:.1f} % MFU"
        print(f"\r{number} candidates{found} (interrupt: best so far)", end="", file=sys.stderr)

    return report


def _task(args: argparse.Namespace) -> _Task:
    asked = _asked(args)
    if args.global_batch is not None and asked.global_batch not in (None, args.global_batch):
        raise EstimateError(
            f"--global-batch {args.global_batch}: Megatron's flags say {asked.global_batch}; give "
            "one of them"
        )
    batch = asked.global_batch if args.global_batch is None else args.global_batch
    if batch is None or batch < 1:
        raise EstimateError(f"--global-batch is {batch}: give the sequences of an iteration")
    cluster = _cluster(args)
    asked = _for_gpus(args, asked, cluster)
    attentions: tuple[Attention, ...] = get_args(Attention)
    if args.attention:
        attentions = tuple(args.attention.split(","))
        for name in attentions:
            if name not in get_args(Attention):
                raise EstimateError(
                    f"--attention {name}: use {', '.join(get_args(Attention))}, with commas"
                )
    question = Question(
        *(asked.model, cluster, batch, asked.fixed, attentions),
        uneven=not args.even_layers,
    )
    if args.profile is None:
        predictor = from_layer_model(asked.element, cluster.overhead, state=asked.state)
        source = "the model of a layer (plan --check compares it with published runs)"
    elif args.profile == "table-5":
        predictor, source = from_table_5(cluster.overhead), "the re-evaluation's table 5"
        question = replace(question, fixed=replace(asked.fixed, tp=4))
    else:
        question, predictor = _profiled(args, question, asked.element)
        source = args.profile
    return _Task(
        question, predictor, asked, source, uncertainty(stages_measured=bool(args.profile))
    )


def _profiled(
    args: argparse.Namespace, question: Question, element: int
) -> tuple[Question, Predictor]:
    """The question narrowed to what the profile has measured."""
    profile = read_profile(Path(args.profile))
    fixed = question.fixed
    for name, flag, given in (
        ("tp", "--tensor-model-parallel-size", fixed.tp),
        ("ep", "--expert-model-parallel-size", fixed.ep),
    ):
        if given not in (None, getattr(profile, name)):
            raise EstimateError(
                f"{args.profile}: {name} is {getattr(profile, name)}, but {flag} is {given}: "
                "profile that size"
            )
    if profile.element != element:
        raise EstimateError(
            f"{args.profile}: element is {profile.element} bytes, the model's are {element}: "
            "profile with the same --bf16 or --fp16 (without them fp32)"
        )
    try:
        predictor = from_profile(profile, question.model, question.cluster.overhead)
    except EstimateError as error:
        raise EstimateError(f"{args.profile}: {error}") from error
    measured = [row for row in profile.stage if row.failure is None]
    if not measured:
        raise EstimateError(f"{args.profile}: stage has no row that ran: profile smaller ones")
    narrowed = replace(
        question,
        fixed=replace(fixed, tp=profile.tp, ep=profile.ep),
        attentions=tuple(a for a in question.attentions if any(r.attention == a for r in measured)),
        micro_batches=tuple(sorted({row.micro_batch for row in measured})),
    )
    return narrowed, predictor


def _asked(args: argparse.Namespace) -> Asked:
    if args.model and args.flags:
        raise EstimateError(f"--model {args.model}: not together with Megatron's flags")
    if not (args.hf_config or args.model or args.flags) or (args.model and args.hf_config):
        raise EstimateError("no model: give --hf-config FILE, --model NAME, or Megatron's flags")
    if not args.hf_config and not args.model:
        return read_flags(args.flags)
    return _from_model(args, "--bf16")


def _for_gpus(args: argparse.Namespace, asked: Asked, cluster: Cluster) -> Asked:
    """The same for GPUs that have fp16 only: fp16 where nothing was asked for, else a refusal."""
    old = next((kind.gpu for kind in cluster.nodes if not kind.gpu.has_bf16), None)
    if old is None:
        return asked
    if not args.flags:
        return _from_model(args, "--fp16")
    if asked.precision == "bf16":
        raise EstimateError(f"--bf16: {old.name} computes in fp16 only; use --fp16")
    if asked.fixed.attention == "flash":
        raise EstimateError(f"--attention-backend flash: {old.name} has no kernel for it")
    return asked


def _from_model(args: argparse.Namespace, precision: str) -> Asked:
    """A model from a config or of the re-evaluation, with the flags beside it."""
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if args.hf_config:
        beside = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        beside.add_argument("--seq-length", type=int)
        seq = beside.parse_known_args(args.flags)[0].seq_length
        if None not in (seq, args.seq_length) and seq != args.seq_length:
            raise EstimateError(
                f"--seq-length {args.seq_length}: Megatron's flags say {seq}; give one of them"
            )
        config = read_config(args.hf_config, args.seq_length or seq)
        model, extra, notes = config.model, config.extra_flags, config.notes
    else:
        model = model_named(args.model)
    words = [*model_flags(model), *extra, *args.flags]
    if not args.flags:
        words += [precision, *TRIAL]
    asked = read_flags(words)
    model = replace(asked.model, name=model.name)
    return replace(asked, model=model, notes=(*asked.notes, *notes))


def _cluster(args: argparse.Namespace) -> Cluster:
    if args.cluster and args.gpu:
        raise EstimateError(f"--gpu {args.gpu}: not together with --cluster {args.cluster}")
    if args.cluster:
        return read_cluster(args.cluster)
    if args.gpu is None or args.gpus is None:
        raise EstimateError("no cluster: give --gpu NAME --gpus N, or --cluster FILE")
    return preset(args.gpu, args.gpus, args.gpus_per_node)


def _shown(found: Found, top: int) -> list[Plan]:
    """The best few, and the best of every way that is not among them."""
    first = list(found.best[:top])
    for way in dict.fromkeys(plan.way for plan in found.best):
        best = found.best_of(way)
        if best is not None and best not in first:
            first.append(best)
    return first


def _chosen(task: _Task, found: Found) -> Plan | None:
    """The plan that the command is for: the best that has the schedule and BPipe as asked for."""
    fixed = task.asked.fixed
    if fixed.bpipe and fixed.transport == "host":
        return found.best_of("host offload")
    if fixed.schedule is not None:
        plain, balanced = ways_of_schedule(fixed.schedule)
        may_balance = fixed.bpipe and not CATALOGUE[fixed.schedule].v_placed
        return found.best_of(*((balanced,) if may_balance else (plain, balanced)))
    if fixed.bpipe:
        return found.best_of(*BALANCED)
    return found.best_of()


def _outside(task: _Task, plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return ()
    run, gpu = plan.candidate.run, plan.candidate.gpus[0]
    way = () if plan.way in ("1F1B", "BPipe") else (f"{plan.way}: fitted on 1F1B and BPipe",)
    return (*way, *outside_calibration(run, gpu, published_cases()))


def _text(args: argparse.Namespace, task: _Task, found: Found, took: float) -> str:
    model, cluster = task.question.model, task.question.cluster
    best = _chosen(task, found)
    lines = [
        f"model     {_describe(model)}",
        f"cluster   {cluster.name}: {cluster.gpus} GPUs, {cluster.gpus_per_node} a node",
        f"times     {task.source}",
        f"searched  {found.looked_at} candidates in {took:.1f} s",
        *(["interrupted: these are the best of what was looked at"] if found.interrupted else []),
        *task.asked.notes,
        "",
    ]
    shown = _shown(found, args.top)
    if shown:
        lines += [plans_table(shown), "", "peak memory by stage"]
        lines += [f"{n}  {memory_line(plan.memory)}" for n, plan in enumerate(shown, 1)]
        lines.append("")
    lines += ["why the rest fell out", fallen_out(found), ""]
    outside = _outside(task, best)
    lines.append(advice(found, task.unsure, bool(outside)))
    if args.profile:
        lines.append(
            f"Predicted MFU was up to {task.unsure.mfu:.1f} points off on ten published runs, "
            "each predicted from the others."
        )
    else:
        lines.append(
            f"On {KNOWN.runs} published runs that nothing was fitted on, seconds were "
            f"{100 * KNOWN.seconds_mean:.0f} % off on average and {100 * KNOWN.seconds_worst:.0f} "
            f"at worst, memory {100 * KNOWN.memory_mean:.0f} and {100 * KNOWN.memory_worst:.0f} "
            "(plan --check)."
        )
    if outside:
        lines.append(
            "Outside the re-evaluation's runs, where BPipe's cost is from: " + "; ".join(outside)
        )
    if best is not None:
        trap = softmax_trap(best.candidate.run)
        lines += [trap] if trap else []
        lines += ["", f"run plan {shown.index(best) + 1} with", _command(args, task, best)]
    return "\n".join(lines)


def _json(args: argparse.Namespace, task: _Task, found: Found) -> str:
    best = _chosen(task, found)
    outside = _outside(task, best)
    return json.dumps(
        {
            "model": asdict(task.question.model),
            "cluster": task.question.cluster.name,
            "times": task.source,
            "plans": [plan_data(plan) for plan in _shown(found, args.top)],
            "too_large": [too_large_data(large) for large in found.too_large],
            "slower": found.slower,
            "not_looked_at": found.reasons,
            "advice": advice(found, task.unsure, bool(outside)),
            "gain_of_bpipe": gain_of_bpipe(found),
            "notes": task.asked.notes,
            "interrupted": found.interrupted,
            "known_error": vars(KNOWN),
            "uncertainty": vars(task.unsure),
            "outside_calibration": outside,
            "command": _command(args, task, best) if best else None,
        },
        indent=2,
    )


def _command(args: argparse.Namespace, task: _Task, plan: Plan) -> str:
    return command_text(plan, task.asked, args.script)


def _describe(model: Model) -> str:
    return (
        f"{model.name}: {model_parameters(model) / 1e9:.1f} B parameters, {model.layers} layers, "
        f"h {model.hidden}, {model.heads} heads, s {model.seq}, vocabulary {model.vocab}"
    )
