#!/usr/bin/env python3
"""Loss curves of 1F1B, PipeDream-2BW and PipeDream on the quickstart's text, on a CPU.

    .venv/bin/python benchmarks/convergence.py [--iterations 300] [--output FILE]

Four stages, the same model, seed, data order and batch of 16 sequences for every update. 1F1B and
2BW split the batch into 8 micro-batches. PipeDream updates after each micro-batch, so its
micro-batch is the whole batch. Writes OUTPUT.json (losses, command, environment) and, with
matplotlib, OUTPUT.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment  # noqa: E402
from scripts.examples.prepare_data import write_dataset  # noqa: E402
from tests.harness import Megatron  # noqa: E402
from tests.harness.models import gpt  # noqa: E402

LAST = 20  # updates over which the final loss is averaged
ONE_UPDATE = ["--micro-batch-size", "16"]
RUNS = {  # name -> flags beside the model's
    "1F1B": [],
    "PipeDream-2BW, weights 1 update old": ["--bpipe-schedule", "pipedream-2bw"],
    "PipeDream, weights 3, 2, 1, 0 updates old": ["--bpipe-schedule", "pipedream", *ONE_UPDATE],
}


def main() -> int:
    """Train all and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=300, help="updates of each run")
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--output", type=Path, help="where .json and .png go, without ending")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_dataset(folder / "text")
        megatron = Megatron(folder, [*data.flags(), "--data-cache-path", str(folder / "cache")])
        try:
            losses = {run: train(megatron, flags, given) for run, flags in RUNS.items()}
        finally:
            megatron.close()
    for run, values in losses.items():
        print(f"{run:44} last {LAST} updates {statistics.mean(values[-LAST:]):.4f}")
    if given.output is not None:
        found = {"command": sys.argv, "environment": environment(), "losses": losses}
        given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        draw(losses, given.output.with_suffix(".png"))
    return 0


def train(megatron: Megatron, flags: list[str], given: Any) -> list[float]:
    """The loss of every update of one run."""
    model = [*gpt(4, 8, None, "--rerun-mode", "disabled", "--clip-grad", "1.0"), "--lr", given.lr]
    steps, seconds = given.iterations, 60 + 10.0 * given.iterations
    result = megatron.train([*model, *flags], steps=steps, report=False, timeout=seconds)
    if not result.ok:
        raise RuntimeError(result.logs)
    return [float(step["lm loss"]) for step in result.states[-1]["losses"]]


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """All curves in one figure, each smoothed over `LAST` updates."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, values in losses.items():
        first = LAST // 2
        smooth = [statistics.mean(values[i : i + LAST]) for i in range(len(values) - LAST + 1)]
        (line,) = axes.plot(range(first, first + len(smooth)), smooth, label=run)
        axes.plot(values, color=line.get_color(), alpha=0.2, linewidth=0.7)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title(f"Four stages, 16 sequences an update; mean of {LAST} updates", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    sys.exit(main())
