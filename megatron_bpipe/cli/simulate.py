"""``simulate``: time a schedule before it runs, and draw it beside another or over a recording."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bpipe.cli.common.output import OutputError, check_output, written
from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import gpu_named
from megatron_bpipe.estimate.models import model_named
from megatron_bpipe.estimate.paper.calibration import outside_calibration
from megatron_bpipe.estimate.paper.op_costs import Inputs, inputs_for
from megatron_bpipe.estimate.paper.published import EXPERIMENTS
from megatron_bpipe.estimate.paper.refined import Measured
from megatron_bpipe.estimate.paper.tables import published_cases, published_constants
from megatron_bpipe.estimate.quantities import UnitError, bandwidth, seconds, size
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.schedule.balancing.balance import BudgetError
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, ScheduleSpec, build, make
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.ops import Schedule, quantity
from megatron_bpipe.simulate import (
    Costs,
    Link,
    Network,
    StageBytes,
    StageCosts,
    exposed_seconds,
    simulate,
)
from megatron_bpipe.simulate.draw.chrome_trace import chrome_trace
from megatron_bpipe.simulate.draw.figure import SUFFIXES, FigureError, write_figure
from megatron_bpipe.simulate.draw.html import page
from megatron_bpipe.simulate.draw.picture import Panel, Picture, panel_of, time_text
from megatron_bpipe.simulate.draw.terminal import draw_panel
from megatron_bpipe.simulate.recorded.overlay import overlay
from megatron_bpipe.simulate.recorded.recording import read_report


class _UsageError(ValueError):
    """Names the flag, its value and the remedy."""


@dataclass(frozen=True)
class _Plan:
    """What is simulated: costs by schedule, or the same ones for all."""

    args: argparse.Namespace
    case: Measured | None
    time_unit: str
    sizes_known: bool

    def inputs(self, schedule: Schedule) -> Inputs:
        """Costs, sizes and links for this schedule."""
        if self.case is not None:
            found = inputs_for(self.case, published_constants(), schedule)
            network = Network(
                found.network.local,
                host=found.network.host,
                contention=self.args.contention,
                tp_share=self.args.tp_share,
            )
            return Inputs(found.costs, found.sizes, network)
        return _given(self.args, schedule)


def run(args: argparse.Namespace) -> int:
    """Simulate, print and write; returns 2 after one line on stderr if that is not possible."""
    try:
        for flag, path, endings in _outputs(args):
            check_output(flag, path, endings)
        picture = _recorded(args) if args.from_report else _simulated(args)
        _write(args, picture)
    except (
        *(_UsageError, OutputError, UnitError),
        *(EstimateError, ReportError, FigureError),
    ) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    return 0


def _outputs(args: argparse.Namespace) -> list[tuple[str, Path | None, tuple[str, ...]]]:
    """Each file that may be written: its flag, its name, the endings it may have."""
    return [
        ("--html", args.html, (".html", ".htm")),
        ("--trace", args.trace, (".json",)),
        ("--png", args.png, SUFFIXES),
        ("--svg", args.svg, (".svg",)),
    ]


def _recorded(args: argparse.Namespace) -> Picture:
    said = {
        flag: getattr(args, flag)
        for flag in ("pp", "microbatches", "base", "budget", "chunks", "parts")
    }
    for flag, value in said.items():
        if value is not None:
            raise _UsageError(f"--{flag} {value}: the recorded run says it; drop --{flag}")
    panels = tuple(overlay(read_report(folder), str(folder)) for folder in args.from_report)
    return Picture(panels, "bytes", "s")


def _simulated(args: argparse.Namespace) -> Picture:
    for flag, value in (("--pp", args.pp), ("--microbatches", args.microbatches)):
        if value is None:
            raise _UsageError(f"{flag} is missing: give a number of at least 1")
        if value < 1:
            raise _UsageError(f"{flag} {value}: give a number of at least 1")
    if not 0 <= args.tp_share <= 1:
        raise _UsageError(f"--tp-share {args.tp_share}: a share is from 0 to 1")
    case = _case(args) if args.model else None
    plan = _Plan(
        args, case, "s" if case or args.forward else "", case is not None or bool(args.activation)
    )
    panels = tuple(_panel(plan, title, schedule) for title, schedule in _schedules(args))
    return Picture(panels, "bytes" if plan.sizes_known else "micro-batches", plan.time_unit)


def _schedules(args: argparse.Namespace) -> list[tuple[str, Schedule]]:
    """What is drawn: the schedule that is asked for, before it the one beside it."""
    stock: tuple[str, Schedule] | None
    if (args.budget, args.chunks, args.group, args.parts) != (None, None, None, None):
        stock, asked = _balanced(args)
    else:
        base = args.base or "bpipe"
        asked = _named(args, "--base", base)
        stock = None if base == "1f1b" else _named(args, "--beside", "1f1b")
    if args.beside == "none":
        stock = None
    elif args.beside is not None:
        stock = _named(args, "--beside", args.beside)
    return [asked] if stock is None else [stock, asked]


def _named(args: argparse.Namespace, flag: str, name: str) -> tuple[str, Schedule]:
    try:
        schedule = build(name, args.pp, args.microbatches)
    except ValueError as error:
        raise _UsageError(f"{flag} {name}: {error}") from None
    return CATALOGUE[name].note, schedule


def _balanced(args: argparse.Namespace) -> tuple[tuple[str, Schedule], tuple[str, Schedule]]:
    """Megatron's schedule with so many chunks, and the same one balanced."""
    chunks = 1 if args.chunks is None else args.chunks
    if args.base is not None:
        given = {"--budget": args.budget, "--chunks": args.chunks, "--parts": args.parts}
        flag = next((flag for flag, value in given.items() if value is not None), "--group")
        raise _UsageError(f"--base {args.base}: drawn as it is; drop {flag} or --base")
    if chunks < 1:
        raise _UsageError(f"--chunks {chunks}: a stage has at least 1")
    parts = 1 if args.parts is None else args.parts
    if parts < 1:
        raise _UsageError(f"--parts {parts}: an activation has at least 1; 1 moves it whole")
    if args.group is not None and chunks == 1:
        raise _UsageError(f"--group {args.group}: only interleaving has groups; add --chunks 2")
    try:
        if chunks == 1:
            name, spec = "1F1B", ScheduleSpec("1f1b", args.pp, args.microbatches, 1)
        else:
            name = f"interleaved 1F1B, {chunks} chunks a stage"
            spec = ScheduleSpec("interleaved", args.pp, args.microbatches, chunks, args.group)
        stock = make(spec)
        balanced = make(replace(spec, balanced=True, budget=args.budget, parts=parts))
    except BudgetError as error:
        raise _UsageError(
            f"--budget {quantity(error.budget)} is too small for --pp {args.pp} --microbatches "
            f"{args.microbatches} --chunks {chunks} --parts {parts}; use --budget "
            f"{quantity(error.least)} or more"
        ) from None
    except ValueError as error:
        raise _UsageError(f"--chunks {chunks}: {error}") from None
    assert balanced.budget is not None, "balance sets it"
    how = f", in {parts} parts" if parts > 1 else ""
    title = f"BPipe on {name}, budget {quantity(balanced.budget)}{how}"
    return (name, stock), (title, balanced)


def _panel(plan: _Plan, title: str, schedule: Schedule) -> Panel:
    lowered = lower(schedule)
    given = plan.inputs(schedule)
    simulation = simulate(lowered, given.costs, given.network)
    panel = panel_of(simulation, given.sizes if plan.sizes_known else None, title, plan.time_unit)
    if panel.moves:
        exposed = time_text(exposed_seconds(simulation), plan.time_unit)
        panel = Panel(**{**vars(panel), "facts": (*panel.facts, ("exposed transfers", exposed))})
    return panel


def _given(args: argparse.Namespace, schedule: Schedule) -> Inputs:
    """Costs from the flags; without units the times are plain numbers."""
    read = seconds if args.forward else float
    try:
        forward = read(args.forward) if args.forward else 1.0
        backward = read(args.backward) if args.backward else 2 * forward
        send = read(args.send) if args.send else 0.0
        transfer = read(args.transfer) if args.transfer else 0.0 if args.link else forward / 2
    except UnitError:
        raise
    except ValueError as error:
        raise _UsageError(f"{error}: with units give --forward too, for example 100ms") from None
    activation = size(args.activation) if args.activation else 0
    if args.link and not activation:
        raise _UsageError(f"--link {args.link}: give --activation too, what travels over it")
    link = Link(bandwidth(args.link)) if args.link else Link()
    chunks = 1 + max(op.chunk for op in schedule.stages[0])
    split = any(op.kind.value == "W" for op in schedule.stages[0])
    back = backward / 2 if split else backward
    stage = StageCosts(
        (forward / chunks,),
        (back / chunks,),
        (back / chunks,),
        evict=transfer,
        load=transfer,
        moved=activation // chunks,
    )
    return Inputs(
        Costs((stage,) * schedule.p, send=send),
        (StageBytes((activation // chunks,)),) * schedule.p,
        Network(link, host=link, contention=args.contention, tp_share=args.tp_share),
    )


def _case(args: argparse.Namespace) -> Measured:
    model, gpu = model_named(args.model), gpu_named(args.gpu)
    layout = Layout(tp=args.tp, pp=args.pp, sequence_parallel=args.tp > 1)
    batch = args.micro_batch * args.microbatches
    run = Run(model, layout, args.micro_batch, batch, args.attention)
    mfu = args.stage_mfu
    if mfu is None:
        wanted = (args.model, args.micro_batch, args.attention)
        known = {(e.model, e.micro_batch, e.attention): e.stage_mfu for e in EXPERIMENTS}
        if wanted not in known:
            raise _UsageError(
                f"--model {args.model} --micro-batch {args.micro_batch} --attention "
                f"{args.attention}: the re-evaluation measured no such stage; give "
                "--stage-mfu PERCENT"
            )
        mfu = known[wanted]
    if not 0 < mfu <= 100:
        raise _UsageError(f"--stage-mfu {mfu}: per cent of the peak, more than 0 and at most 100")
    for outside in outside_calibration(run, gpu, published_cases()):
        print(f"extrapolated: {outside}", file=sys.stderr)
    return Measured(run, gpu, mfu, 0.0)


def _write(args: argparse.Namespace, picture: Picture) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    for panel in picture.panels:
        print(draw_panel(panel, width, picture.memory_unit, picture.time_unit))
        if panel.ghost:
            print(draw_panel(panel.ghost, width, picture.memory_unit, picture.time_unit))
    heading = " beside ".join(panel.title for panel in picture.panels)
    try:
        if args.html:
            args.html.write_text(page(picture, heading), encoding="utf-8")
        if args.trace:
            args.trace.write_text(json.dumps(chrome_trace(picture)), encoding="utf-8")
        for path in filter(None, (args.png, args.svg)):
            write_figure(picture, path)
    except OSError as error:
        raise _UsageError(f"{error.filename}: {error.strerror}; choose another place") from error
    for path in filter(None, (args.html, args.trace, args.png, args.svg)):
        written(path)
