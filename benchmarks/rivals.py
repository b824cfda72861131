#!/usr/bin/env python3
"""The ways to save pipeline memory or bubbles, on one model and one machine, side by side.

    .venv/bin/python benchmarks/rivals.py --output OUT [--rounds 2] [--steps 7] [--only NAME ...]

Every rival trains the same model with the same micro-batches for a few iterations; all take turns,
round after round, so that what else the machine does meets all alike. Measured: seconds of an
iteration between barriers of all ranks, and the most activation bytes of the fullest stage, from
live storages (on GPUs the allocator's peak besides), with what a recomputing layer makes anew.
Predicted beside it: the simulator, from the bytes and, where ops are not paced, the op times that
the stock 1F1B run recorded.

With fewer cores than stages the ranks would share cores and no bubble would show. There every op is
paced: it lasts --pace milliseconds (backward twice that, W and the rest of a split backward once,
recomputation its share), computed or slept, as if each stage had a device of its own. Messages,
copies and everything else of Megatron's loop are real. `--pace 0` does not pace; on GPUs that is
the default. Takes about 7 minutes on two idle cores; writes OUT/rivals.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.environment import environment  # noqa: E402
from benchmarks.rivals_report import Rival, Row, draw, made_again, predict, table  # noqa: E402
from benchmarks.torchrun import torchrun  # noqa: E402
from megatron_bpipe.simulate.recorded.recording import Recording, read_report  # noqa: E402

RANK = ROOT / "benchmarks" / "rivals_rank.py"
TWO_CHUNKS = ("--num-virtual-stages-per-pipeline-rank", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
SELECTIVE = ("--recompute-granularity", "selective")
WARM = 2  # iterations of each run that are not counted
SECONDS = 240.0  # most that one run may take


def rivals(p: int, sequence: int, hidden: int) -> list[Rival]:
    """All of them; ``published`` is for p stages, in micro-batches of a whole stage."""
    core = sequence / (6 * hidden + sequence)  # attention's share of a layer's forward FLOPs
    return [
        Rival("1F1B", (), published=f"{p}"),
        Rival("interleaved", TWO_CHUNKS, "interleaved", published=f"{p + (p - 1) / 2:g}"),
        Rival("BPipe", ("--bpipe",), balanced=True, published=f"{(p + 3) // 2}"),
        Rival("BPipe, interleaved", ("--bpipe", *TWO_CHUNKS), "interleaved", balanced=True),
        Rival("ZB-H1", ("--bpipe-schedule", "zb-h1"), "zb-h1", published=f"{p}"),
        Rival("BPipe on ZB-H1", ("--bpipe-schedule", "zb-h1", "--bpipe"), "zb-h1", balanced=True),
        *(
            Rival(name, ("--bpipe-schedule", flag, *TWO_CHUNKS), flag, published=published)
            for name, flag, published in (
                ("V-Half", "v-half", f"{(p + 2) // 2}"),
                ("V-Min", "v-min", f"{(p + 4) // 3}"),
                ("V-ZB", "v-zb", f"{p}"),
            )
        ),
        Rival("GPipe", ("--bpipe-schedule", "gpipe"), "gpipe", published="m"),
        Rival(
            "host offload",
            ("--bpipe", "--bpipe-transport", "host"),
            balanced=True,
            to_host=True,
        ),
        Rival("selective recomputation", SELECTIVE, recomputed=core),
        Rival("full recomputation", (*FULL, "--recompute-num-layers", "1"), recomputed=1.0),
    ]


def main() -> int:
    """Measure, predict, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=2, help="how often every rival has its turn")
    parser.add_argument("--steps", type=int, default=7, help=f"iterations a turn, {WARM} warm up")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--pace", type=float, help="milliseconds of a stage's forward; 0: none")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these and stock 1F1B")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more of Megatron's")
    asked = parser.parse_args()
    if asked.steps <= WARM:
        parser.error(f"--steps {asked.steps}: {WARM} warm up; give {WARM + 1} or more")
    if asked.pace is None:
        few = not torch.cuda.is_available() and (os.cpu_count() or 1) < asked.stages
        asked.pace = 30.0 if few else 0.0
    chosen = rivals(asked.stages, asked.sequence, asked.hidden)
    if asked.only:
        unknown = set(asked.only) - {rival.name for rival in chosen}
        if unknown:
            names = ", ".join(rival.name for rival in chosen)
            parser.error(f"--only {', '.join(sorted(unknown))}: choose from {names}")
        chosen = [r for n, r in enumerate(chosen) if n == 0 or r.name in asked.only]
    asked.output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        from scripts.examples import forked_ranks

        print("importing Megatron", flush=True)
        forked_ranks.import_megatron()
    seconds: dict[str, list[float]] = {rival.name: [] for rival in chosen}
    recordings: dict[str, Recording] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(asked.rounds):
            for rival in chosen:
                out = Path(folder, f"{turn}-{chosen.index(rival)}")
                seconds[rival.name] += run(rival, asked, out)
                recordings[rival.name] = read_report(out / "report")
                shown = seconds[rival.name][-1]
                spent = time.monotonic() - begun
                print(f"{spent:5.0f} s  {rival.name}: {shown:.3f} s an iteration", flush=True)
    rows = summarise(chosen, seconds, recordings, asked)
    write(rows, asked)
    return 0


def model(asked: argparse.Namespace) -> list[str]:
    """The model and its batch as Megatron's flags."""
    batch = asked.micro_batch_size * asked.microbatches
    return [
        *("--pipeline-model-parallel-size", str(asked.stages), "--num-layers", str(asked.layers)),
        *("--hidden-size", str(asked.hidden), "--num-attention-heads", "4"),
        *("--seq-length", str(asked.sequence), "--max-position-embeddings", str(asked.sequence)),
        *("--micro-batch-size", str(asked.micro_batch_size), "--global-batch-size", str(batch)),
        *("--untie-embeddings-and-output-weights", "--lr", "1e-4"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--mock-data", "--split", "100,0,0", "--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", "255", "--eval-iters", "0", "--eval-interval", "100000"),
        *("--log-interval", "1000", "--distributed-timeout-minutes", "3"),
        *asked.flags,
    ]


def run(rival: Rival, asked: argparse.Namespace, out: Path) -> list[float]:
    """One turn; seconds of its iterations but the first ones."""
    out.mkdir()
    log, written = out / "log", out / "seconds.json"
    flags = [*model(asked), *rival.flags, "--bpipe-report", str(out / "report")]
    flags += ["--train-iters", str(asked.steps)]
    variables = {
        "RIVALS_OUT": str(written),
        "RIVALS_PACE": json.dumps(pace(rival, asked.pace / 1000)),
    }
    if torch.cuda.is_available():
        words = ["-m", "megatron_bpipe", "run", str(RANK), *flags]
        failed = torchrun(words, asked.stages, SECONDS, log, variables)
    else:
        from megatron_bpipe.integration.cpu.flags import cpu_flags
        from scripts.examples import forked_ranks

        os.environ.update(variables)
        with log.open("w", encoding="utf-8") as sink:
            statuses = forked_ranks.train(
                RANK, [*flags, *cpu_flags()], asked.stages, lambda line: _say(sink, line), _tick
            )
        failed = next((status for status in statuses if status), 0)
    if failed != 0:
        sys.exit(f"{rival.name} failed ({failed}):\n{log.read_text(encoding='utf-8')[-3000:]}")
    found: list[float] = json.loads(written.read_text())
    return found[WARM:]


def _say(sink: Any, line: str) -> None:
    print(line, file=sink)


def _tick(_: int) -> None:
    """Nobody watches."""


def pace(rival: Rival, forward: float) -> dict[str, float]:
    """Seconds of one chunk's ops."""
    chunk = forward / rival.chunks
    return {
        "forward": chunk,
        "backward": chunk * ((1 if rival.splits else 2) + rival.recomputed),
        "weight": chunk,
    }


def summarise(
    chosen: list[Rival],
    seconds: dict[str, list[float]],
    recordings: dict[str, Recording],
    asked: argparse.Namespace,
) -> list[Row]:
    """Rows in the order of the rivals, stock first."""
    stock = recordings[chosen[0].name]
    ordered = sorted(seconds[chosen[0].name])
    rest = max(0.0, ordered[len(ordered) // 2] - stock.seconds)
    element = 4 if not {"--bf16", "--fp16"} & set(asked.flags) else 2
    tokens = asked.sequence * asked.micro_batch_size
    left = 16 * element * tokens * asked.hidden * asked.layers // asked.stages
    rows = []
    for rival in chosen:
        own = recordings[rival.name]
        stages = own.run.stages
        fullest = max(stages, key=lambda stage: stage.peak_activation_bytes)
        again = made_again(rival, stock, own, asked.layers // asked.stages)
        predicted, foreseen = predict(rival, asked.pace / 1000, stock, own, rest, left)
        allocated = [stage.allocator_peak_bytes for stage in stages]
        rows.append(
            Row(
                rival,
                tuple(seconds[rival.name]),
                fullest.peak_activation_bytes + again,
                max(stage.peak_microbatches for stage in stages),
                max((one for one in allocated if one is not None), default=None),
                predicted,
                foreseen + again,
            )
        )
    return rows


def write(rows: list[Row], asked: argparse.Namespace) -> None:
    """Table, figure and figures as JSON."""
    paced = f", paced at {asked.pace:g} ms a forward" if asked.pace else ""
    title = (
        f"p = {asked.stages}, m = {asked.microbatches}, {asked.layers} layers, "
        f"h {asked.hidden}, s {asked.sequence}{paced}"
    )
    document = {
        "command": " ".join(["benchmarks/rivals.py", *sys.argv[1:]]),
        "model": " ".join(model(asked)),
        "pace_milliseconds": asked.pace,
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
    }
    shown = table(rows)
    print(f"\n{title}\n\n{shown}")
    (asked.output / "rivals.json").write_text(json.dumps(document, indent=1) + "\n")
    (asked.output / "rivals.md").write_text(f"{title}\n\n{shown}\n")
    draw(rows, asked.output / "rivals.png", title)


if __name__ == "__main__":
    sys.exit(main())
