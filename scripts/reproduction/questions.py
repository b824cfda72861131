"""The ten questions of the summary, each answered with a number."""

from __future__ import annotations

from dataclasses import replace

from common import GIB, bpipe_case, errors, exposed_at, least_bandwidth, percent

from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.estimate.memory.activations import MEGATRON_2023, micro_batch_bytes
from megatron_bpipe.estimate.models import TABLE_2
from megatron_bpipe.estimate.paper.equations import equation_4
from megatron_bpipe.estimate.paper.op_costs import inputs_for
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, GLOBAL_BATCH, LAYOUT
from megatron_bpipe.estimate.paper.refined import costs, predict_mfu
from megatron_bpipe.estimate.paper.tables import measured, published_constants
from megatron_bpipe.estimate.time.flops import equation_1
from megatron_bpipe.estimate.time.kernels.fused_softmax_rules import why_not_fused
from megatron_bpipe.schedule.bases.catalogue import build
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.schedule.validation.occupancy import occupancy
from megatron_bpipe.simulate import exposed_seconds, simulate


def ten_questions() -> str:
    """The ten questions, a number each."""
    answers = (
        flash_attention, architecture, tighter_bound, mapping, choosing,
        across_nodes, data_parallel, elsewhere, optimizer, attribution,
    )  # fmt: skip
    texts = "\n\n".join(f"**{n}. {answer()}" for n, answer in enumerate(answers, 1))
    return f"## The ten questions of the summary\n\n{texts}"


def flash_attention() -> str:
    """Question 1."""
    gain = {pair: stage_gain(*pair) for pair in ((7, 8), (9, 10))}
    needed = 1 / equation_4(1.0, 1.0, 2, 1, GLOBAL_BATCH, LAYOUT.pp)
    sizes = {
        a: micro_batch_bytes(bpipe_case(9, attention=a).run, 1, MEGATRON_2023) / GIB
        for a in ("none", "flash")
    }
    return f"""Why does flash attention leave BPipe so little?** A micro-batch of GPT-3 96B keeps
{sizes["none"]:.2f} GiB a stage with stock attention, {sizes["flash"]:.2f} GiB with flash: less
imbalance to remove. And b = 2 makes a stage only {gain[9, 10]:.1f} % faster (rows 9, 10) instead of
{gain[7, 8]:.1f} % (rows 7, 8), while the larger bubble alone needs {100 * (needed - 1):.1f} % to
break even, before BPipe's own cost."""


def stage_gain(before: int, after: int) -> float:
    """By how many per cent the single stage gets faster."""
    mfu = {e.id: e.stage_mfu for e in EXPERIMENTS}
    return 100 * (mfu[after] / mfu[before] - 1)


def architecture() -> str:
    """Question 2."""
    needed = 100 * (1 / equation_4(1.0, 1.0, 4, 2, GLOBAL_BATCH, LAYOUT.pp) - 1)
    return f"""Why GPT-3 and not LLaMA?** The number of heads. GPT-3 96B has 104 / 4 = 26 heads a
rank, so at b = 1 Megatron's fused softmax kernel refuses ({why_not_fused(1, 26, 2048)[0]}); LLaMA
has 16 and never meets that. And LLaMA fits b = 2 without BPipe, which has to go to b = 4: the
stage gains {stage_gain(2, 3):.1f} % (recompute) or {stage_gain(5, 6):.1f} % (flash), the bubble
takes {needed:.1f} %."""


def tighter_bound() -> str:
    """Question 3."""
    return f"""How can the bound be made tighter?** By simulating the schedule with what the
equations leave out. Distance from the published MFU: {errors()}"""


def mapping() -> str:
    """Question 4."""
    found = {}
    for name, nodes in (
        ("in order", tuple(x // 2 for x in range(8))),
        ("pair-adjacent", tuple(min(x, 7 - x) for x in range(8))),
    ):
        pairs = sum(nodes[x] != nodes[7 - x] for x in range(4))
        edges = sum(nodes[x] != nodes[x + 1] for x in range(7))
        found[name] = f"{pairs} of 4 pairs and {edges} of 7 pipeline edges between nodes"
    slow, whole = exposed_at(6, A100_80G.network)
    edge = 2 * bpipe_case(6).run.tokens * 8192 / LAYOUT.sp
    return f"""What does the mapping of stages to devices trade?** On the published cluster (two
stages of t = 4 a node) in order: {found["in order"]};
pair-adjacent: {found["pair-adjacent"]}.
A pair that crosses nodes at 25 GB/s costs row 6 {slow:.2f} s ({percent(slow, whole)}) an
iteration; an edge moves {edge / 2**20:.0f} MiB a GPU and message, an eviction
{micro_batch_bytes(bpipe_case(6).run, 1, MEGATRON_2023) / GIB:.1f} GiB, so the pair goes first."""


def choosing() -> str:
    """Question 5."""
    constants = published_constants()
    lines = []
    for model in TABLE_2:
        for attention in ("flash", "recompute"):
            known = [e for e in EXPERIMENTS if (e.model, e.attention) == (model, attention)]
            cells = []
            for e in known:
                case = replace(measured(e), run=e.run(bpipe=e.bpipe))
                cells.append(
                    f"b = {e.micro_batch}{', BPipe' if e.bpipe else ''}: "
                    f"{predict_mfu(case, constants):.1f}"
                )
            lines.append(f"| {model} | {attention} | {'; '.join(cells)} |")
    head = "| model | attention | refined MFU |\n| --- | --- | --- |\n"
    return f"""How should p, b and the rest be chosen?** Enumerate and simulate: a choice takes
milliseconds. BPipe pays if the stage's gain from a larger b exceeds what the bubble takes,
(B + b'(p-1)) / (B + b(p-1)), and its own cost. For the runs whose stage was measured:

{head}""" + "\n".join(lines)


def across_nodes() -> str:
    """Question 6."""
    least = {row: least_bandwidth(row) / 1e9 for row in (3, 6, 8, 10)}
    text = ", ".join(f"row {row} {value:.0f}" for row, value in least.items())
    sends = [sum(op.kind.value == "E" for op in line) for line in build("bpipe", 8, 64).stages]
    return f"""What if pairs must cross nodes?** Evict as rarely as possible (the pass finds the
minimum: {", ".join(map(str, sends[:4]))} evictions of 64 micro-batches on stages 0 to 3) and give
transfers time: they stay hidden above (GB/s a GPU) {text}. Below that a smaller share of the
micro-batch has to travel, or the host's memory takes it."""


def data_parallel() -> str:
    """Question 7."""
    constants = published_constants()
    values = []
    for dp in (1, 2, 4):
        case = bpipe_case(10)
        layout = replace(case.run.layout, dp=dp)
        run = replace(case.run, layout=layout, global_batch=GLOBAL_BATCH * dp)
        values.append(f"{predict_mfu(replace(case, run=run), constants):.2f} at dp = {dp}")
    case = bpipe_case(10)
    fixed = replace(case.run, layout=replace(case.run.layout, dp=4))
    small = predict_mfu(replace(case, run=fixed), constants)
    return f"""What changes with data parallelism?** Nothing in the schedule: each replica balances
its own pipeline. With the batch grown alike, row 10 has {", ".join(values)} % MFU (the reduce of
fp32 gradients at 25 GB/s, not overlapped). With the batch of {GLOBAL_BATCH} shared by four
replicas m falls to {fixed.micro_batches} and MFU to {small:.1f} %: the bubble. Beyond dp = 1 this
is extrapolated, as `outside_calibration` marks."""


def elsewhere() -> str:
    """Question 8."""
    case = bpipe_case(10)
    schedule = build("host-offload", 8, case.run.micro_batches)
    given = inputs_for(case, published_constants(), schedule)
    found = simulate(lower(schedule), given.costs, given.network)
    exposed, pcie = exposed_seconds(found), A100_80G.host / 1e9
    return f"""Is the idea of use elsewhere?** It is paging with a known future, so wherever a saved
tensor has a long gap between its uses and a neighbour has room. The same pass balances interleaved
1F1B (p = 8, m = 16, in chunks: {peaks_of("interleaved")} before, {peaks_of("interleaved-bpipe")}
after, the partner's pool within the same bound) and sends to the host where there is no neighbour,
as in plain data parallelism: over {pcie:.0f} GB/s of PCIe whole micro-batches cost row 10
{percent(exposed, found.seconds)} of an iteration when they leave and return beside one
computation each."""


def peaks_of(name: str) -> str:
    """Peaks by stage."""
    return ", ".join(str(max(occupancy(line)[0])) for line in build(name, 8, 16).stages)


def optimizer() -> str:
    """Question 9."""
    constants = published_constants()
    values = []
    for batch in (128, 32, 16):
        case = bpipe_case(9, global_batch=batch)
        once = costs(case, constants).once
        flops = equation_1(case.run.model, batch)
        seconds = flops / (A100_80G.flops * LAYOUT.gpus * predict_mfu(case, constants) / 100)
        values.append(f"{100 * once / seconds:.2f} % at B = {batch}")
    return f"""When does the optimizer matter?** Its step moves 42 bytes a parameter through memory:
of an iteration of row 9 {", ".join(values)}. Left out it is an error of a tenth of a point at the
paper's batch; it matters for batches of a few micro-batches, or when the step or the reduce goes
over a slow link. (B below 128 is outside the calibrated range.)"""


def attribution() -> str:
    """Question 10."""
    both = 1 + stage_gain(7, 8) / 100
    batch = 1 + stage_gain(9, 10) / 100
    t2 = "runs" if not why_not_fused(1, 52, 2048) else "does not run"
    return f"""Why do the original figures for GPT-3 differ?** At t = 2 (52 heads a rank) the fused
softmax {t2} at b = 1, which explains the high figure the re-evaluation calls contradictory. Of the
{100 * (both - 1):.0f} % that a stage gains from row 7 to 8, {100 * (batch - 1):.0f} % come with the
batch also under flash attention; the remaining {100 * (both / batch - 1):.0f} % are the kernel's.
To attribute it: run row 7 with t = 2, with 112 heads, and with the unfused kernel forced at b = 2.
Not explained: the original's 1.32x with flash attention."""
