"""Write docs/planning/reproduction.md and its figures: ``make_reproduction.py [--check]``.

Everything in it is computed here, from the schedules, the simulator and the estimator, or read from
a recorded run under runs/quickstart (scripts/quickstart.sh writes it; without it that part says
so).  --check only compares the text with what is there: exit 1 if it is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import GIB, bpipe_case, errors, exposed_at, least_bandwidth, percent
from figures import draw_pareto, draw_schedules
from questions import ten_questions

from megatron_bpipe.estimate.hardware import A100_80G
from megatron_bpipe.estimate.memory.activations import MEGATRON_2023
from megatron_bpipe.estimate.memory.stages import memory_by_stage
from megatron_bpipe.estimate.models import TABLE_2
from megatron_bpipe.estimate.paper.pareto import Point, by_budget, frontier, points
from megatron_bpipe.estimate.paper.published import EXPERIMENTS, GLOBAL_BATCH
from megatron_bpipe.estimate.paper.refined import bytes_moved
from megatron_bpipe.estimate.paper.tables import decisions, published_constants, table_rows
from megatron_bpipe.estimate.time.flops import equation_1, equation_1_corrected
from megatron_bpipe.schedule.bases.catalogue import build
from megatron_bpipe.schedule.validation.occupancy import occupancy

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "planning" / "reproduction.md"
IMAGES = ROOT / "docs" / "images"
QUICKSTART = ROOT / "runs" / "quickstart"


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = document()
    if check:
        same = DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{DOCUMENT} is out of date: run {Path(__file__).name}")
        return 0 if same else 1
    IMAGES.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(text, encoding="utf-8")
    draw_schedules(IMAGES / "stock-and-bpipe.png")
    draw_pareto(IMAGES / "pareto.png")
    print(f"wrote {DOCUMENT} and two figures in {IMAGES}")
    return 0


def document() -> str:
    """The whole text."""
    parts = (introduction, tables, three_questions, ten_questions, pareto, sources)
    return "\n\n".join(part() for part in parts) + "\n"


def introduction() -> str:
    """What this is."""
    return """# What the re-evaluation measured, and what this package says of it

Written by `scripts/reproduction/make_reproduction.py`; do not edit by hand. No figure here was
measured on the re-evaluation's cluster by us: *published* are the numbers of "Re-evaluating the
Memory-balanced Pipeline Parallelism: BPipe" (arXiv 2401.02088), everything else is computed from
them and from data sheets by the estimator and the simulator, or measured on CPU runs where it
says so."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables() -> str:
    """Tables 2, 3 and 5."""
    two = table(
        ("model", "h", "a", "s", "l", "B", "parameters' part of FLOPs: eq. 1, with v/(12lh)"),
        (
            (
                name,
                m.hidden,
                m.heads,
                m.seq,
                m.layers,
                GLOBAL_BATCH,
                f"{equation_1(m, GLOBAL_BATCH):.4e}, {equation_1_corrected(m, GLOBAL_BATCH):.4e}",
            )
            for name, m in TABLE_2.items()
        ),
    )
    by_id = {experiment.id: experiment for experiment in EXPERIMENTS}
    rows = table_rows()
    three = table(
        (
            *("id", "model", "b", "BPipe", "attention", "stage MFU (table 5)", "published"),
            *("eq. 3", "physics", "refined", "left out", "fits", "without BPipe", "peak GiB"),
        ),
        (
            (
                row.id,
                row.model,
                row.micro_batch,
                "yes" if row.bpipe else "no",
                row.attention,
                by_id[row.id].stage_mfu,
                row.published_mfu,
                f"{row.equation_mfu:.1f}",
                f"{row.physics_mfu:.1f}",
                f"{row.refined_mfu:.1f}",
                f"{row.refined_loo_mfu:.1f}",
                row.fits,
                row.fits_without_bpipe,
                f"{row.peak_gib:.1f}",
            )
            for row in rows
        ),
    )
    gains = table(
        ("from row to row", "published", "eq. 3", "refined", "left out"),
        (
            (
                f"{d.before} to {d.after}",
                *(f"{v:+.1f}" for v in (d.published, d.equation, d.refined, d.refined_loo)),
            )
            for d in decisions(rows)
        ),
    )
    return f"""## Tables 2, 3 and 5

Equation 1 as printed has v/(16lh) for the output layer; counting its multiplications gives
v/(12lh), which is what `equation_1_corrected` has. All MFU below use the printed form, as the
paper.

{two}

MFU in per cent. *eq. 3* takes off the bubble only (read without the factor p that the printed form
has too much). *physics* simulates the schedule with the output layer, sends, optimizer; its one
constant is fitted on the rows without BPipe. *refined* adds one empirical BPipe penalty. *left out*
is refined with that row kept out of the fit. *fits* is for 80 GiB; what would fit without BPipe is
our inference, the re-evaluation does not say.

{three}

Distance from the published MFU, in points: {errors()}

What BPipe gains, in points of MFU:

{gains}"""


def three_questions() -> str:
    """The three questions of the original paper's notes."""
    rows = {row.id: row for row in table_rows()}
    peaks = {
        name: [max(occupancy(line)[0]) for line in build(name, 8, 64).stages]
        for name in ("1f1b", "bpipe")
    }
    bandwidths = (300e9, 100e9, 50e9, 25e9, 12.5e9)
    exposed = table(
        ("row", *(f"{b / 1e9:g} GB/s" for b in bandwidths), "hidden from"),
        (
            (
                row,
                *(percent(*exposed_at(row, bandwidth)) for bandwidth in bandwidths),
                f"{least_bandwidth(row) / 1e9:.0f} GB/s",
            )
            for row in (3, 6, 8, 10)
        ),
    )
    constants = published_constants()
    losses = [
        constants.bpipe * bytes_moved(bpipe_case(row).run, MEGATRON_2023) for row in (3, 6, 8, 10)
    ]
    return f"""## The three questions of the original BPipe evaluation

**Does it make training faster?** Only where a larger micro-batch gains more than it costs: of the
four choices in table 3 one gains ({rows[7].published_mfu} to {rows[8].published_mfu} % MFU, where
it also replaces slow softmax kernels) and three lose. The estimator gets all four signs right with
each row left out (table above).

**Does it flatten memory?** Micro-batches held by stages 0 to 7 (p = 8, m = 64): 1F1B
{", ".join(map(str, peaks["1f1b"]))}; BPipe {", ".join(map(str, peaks["bpipe"]))} of their own, and
with the slots they lend no stage has more than {build("bpipe", 8, 64).budget}. {quickstart()}

![1F1B and BPipe, p = 8, m = 16](../images/stock-and-bpipe.png)

Drawn by the simulator: a backward takes two forwards, a transfer half a forward.

**Does it evict and load without slowing down?** In the simulation yes, on a link that is fast
enough: the iteration gets longer by (a link of its own for each pair, one direction)

{exposed}

The published runs lost more than that: the fitted penalty is
{", ".join(f"{loss:.2f}" for loss in losses)} s an iteration in rows 3, 6, 8 and 10. On NVLink the
bytes alone do not explain it; candidates are contention with tensor-parallel traffic, pipeline
edges that pair-adjacent placement moves between nodes, and transfers that were not asynchronous in
that implementation. Four rows cannot tell these apart."""


def quickstart() -> str:
    """What a recorded pair of runs says; empty advice without one."""
    paths = [QUICKSTART / name / "memory.json" for name in ("stock", "bpipe")]
    if not all(path.exists() for path in paths):
        return "(`scripts/quickstart.sh` measures it on a CPU; no recording was at hand here.)"
    peaks = []
    for path in paths:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        peaks.append([stage["peak_activation_bytes"] / 2**20 for stage in stages])
    stock, bpipe = (", ".join(f"{peak:.0f}" for peak in run) for run in peaks)
    return (
        f"Measured on a CPU (`scripts/quickstart.sh --stages {len(peaks[0])}`), MiB of live "
        f"activations and lent pool by stage: stock {stock}; BPipe {bpipe}."
    )


def pareto() -> str:
    """MFU against memory."""
    constants = published_constants()
    parts = ["## MFU against memory", "![Pareto](../images/pareto.png)"]
    parts.append(
        "32 A100, t = 4, p = 8, B = 128, by simulation with the stage times of table 5. BPipe with "
        "its penalty as fitted on the re-evaluation's runs, and (hollow in the figure) without; "
        "interleaved BPipe (2 chunks, the least budget) has the same per byte moved. The others "
        "have no such constant: nobody measured them on that cluster, so they are at their best "
        "here, with messages of interleaved and V-Half that hold up no sender. Host offload moves "
        "whole micro-batches just in time; finer schemes hide more."
    )
    for model in TABLE_2:
        found = points(model, constants)
        best = {(p.method, p.micro_batch) for p in frontier(found)}
        parts.append(f"### {model}")
        parts.append(
            table(
                ("method", "b", "MFU", "with penalty", "peak GiB", "fits", "exposed", "frontier"),
                (
                    (
                        p.method,
                        p.micro_batch,
                        f"{p.mfu:.1f}",
                        f"{p.mfu_with_penalty:.1f}",
                        f"{p.peak_gib:.1f}",
                        p.fits,
                        f"{p.exposed_seconds:.1f} s" if p.exposed_seconds else "",
                        "yes" if (p.method, p.micro_batch) in best else "",
                    )
                    for p in found
                ),
            )
        )
        parts.append(interleaved_balanced(model, found))
    return "\n\n".join(parts)


def interleaved_balanced(model: str, found: Sequence[Point]) -> str:
    """Where interleaved BPipe is on the frontier and where not, and its budgets."""
    name, constants = "interleaved BPipe", published_constants()
    placed = [p for p in found if p.method != "V-Half"]  # that one places layers anew
    on, there = (
        [f"b = {p.micro_batch}" for p in frontier(points) if p.method == name]
        for points in (found, placed)
    )
    largest = max((p for p in found if p.method == "interleaved" and p.fits == "yes"),
                  key=lambda p: p.micro_batch).micro_batch  # fmt: skip
    budgets = []
    for b in (largest, 2 * largest):
        cells = [
            f"{p.method.split()[-1]}: {p.mfu_with_penalty:.1f} %, {p.peak_gib:.1f} GiB"
            for p in by_budget(model, constants, b)
        ]
        budgets.append(f"b = {b}: {'; '.join(cells)}.")
    return (
        f"{name} is on this frontier with {', '.join(on) or 'no micro-batch'}; among "
        "those that leave layers where Megatron places them (all but V-Half) with "
        f"{', '.join(there) or 'none'}. By its budget "
        "(micro-batches of a whole stage; the first evicts nothing), MFU with penalty and memory "
        f"of the fullest GPU: {' '.join(budgets)}"
    )


def sources() -> str:
    """Where every constant comes from."""
    gpu, constants = A100_80G, published_constants()
    last = memory_by_stage(bpipe_case(9).run, MEGATRON_2023)[-1]
    rows = (
        ("dense bf16 peak", f"{gpu.flops / 1e12:.0f} TFLOP/s", "NVIDIA A100 data sheet"),
        (
            "large matrix multiplication",
            f"{gpu.matmul_share * gpu.flops / 1e12:.1f} TFLOP/s",
            "github.com/stas00/ml-engineering, compute/accelerator",
        ),
        ("memory", f"{gpu.memory_gib:.0f} GiB", "the re-evaluation, section 3.1"),
        ("memory bandwidth", f"{gpu.memory_bandwidth / 1e12:.3f} TB/s", "A100 80GB SXM data sheet"),
        ("NVLink, one direction", f"{gpu.nvlink / 1e9:.0f} GB/s", "A100 data sheet"),
        ("network a GPU", f"{gpu.network / 1e9:.0f} GB/s", "200 Gb/s a GPU, DGX A100"),
        ("PCIe a GPU", f"{A100_80G.host / 1e9:.0f} GB/s", "PCIe 4 shared both ways, as observed"),
        ("single-stage MFU", "table above", "the re-evaluation, table 5"),
        (
            "one exchange between stages",
            f"{1e-9 / constants.exchange:.2f} GB/s",
            "fitted on the rows without BPipe",
        ),
        ("BPipe penalty", f"{1e-9 / constants.bpipe:.0f} GB/s", "fitted on the rows with BPipe"),
        ("state of a parameter", "18 bytes", "bf16 weights, fp32 gradients, master, two moments"),
        (
            "activations",
            "by tensor",
            "megatron_bpipe/estimate/memory/activations.py, agrees with Korthikanti et al. 2022",
        ),
        (
            "vocabulary",
            "51200, 32000",
            "assumed (GPT-2 padded, LLaMA); the re-evaluation does not say",
        ),
        ("fixed overhead", f"{last.overhead / GIB:.0f} GiB", "assumed: CUDA, NCCL, fragmentation"),
    )
    return "## Sources of the constants\n\n" + table(("constant", "value", "source"), rows)


if __name__ == "__main__":
    sys.exit(main())
