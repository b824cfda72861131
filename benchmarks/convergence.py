#!/usr/bin/env python3
"""Loss curves of 1F1B, PipeDream-2BW and PipeDream on the quickstart's text, on a CPU.

    .venv/bin/python benchmarks/convergence.py [--iterations 300] [--lr 1e-3 2e-4]
        [--output FILE]

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
    parser.add_argument("--lr", nargs="+", default=["1e-3", "2e-4"], help="learning rates")
    parser.add_argument("--output", type=Path, help="where .json and .png go, without ending")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_dataset(folder / "text")
        megatron = Megatron(folder, [*data.flags(), "--data-cache-path", str(folder / "cache")])
        try:
            losses = {
                lr: {
                    run: train(megatron, flags, lr, given.iterations) for run, flags in RUNS.items()
                }
                for lr in given.lr
            }
        finally:
            megatron.close()
    for lr, curves in losses.items():
        for run, values in curves.items():
            print(f"lr {lr} {run:44} last {LAST} updates {statistics.mean(values[-LAST:]):.4f}")
    if given.output is not None:
        found = {"command": sys.argv, "environment": environment(), "losses": losses}
        given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        draw(losses, given.output.with_suffix(".png"))
    return 0


def train(megatron: Megatron, flags: list[str], lr: str, steps: int) -> list[float]:
    """The loss of every update of one run."""
    model = [*gpt(4, 8, None, "--rerun-mode", "disabled", "--clip-grad", "1.0"), "--lr", lr]
    seconds = 60 + 10.0 * steps
    result = megatron.train([*model, *flags], steps=steps, report=False, timeout=seconds)
    if not result.ok:
        raise RuntimeError(result.logs)
    return [float(step["lm loss"]) for step in result.states[-1]["losses"]]


def draw(losses: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel for each learning rate; curves are smoothed over `LAST` updates."""
    from matplotlib import pyplot as plt

    size = (5.2 * len(losses), 4.5)
    figure, panels = plt.subplots(
        1, len(losses), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (lr, curves) in zip(panels[0], losses.items(), strict=True):
        for run, values in curves.items():
            smooth = [statistics.mean(values[i : i + LAST]) for i in range(len(values) - LAST + 1)]
            middle = range(LAST // 2, LAST // 2 + len(smooth))
            (line,) = axes.plot(middle, smooth, label=run)
            axes.plot(values, color=line.get_color(), alpha=0.2, linewidth=0.7)
        axes.set_title(f"learning rate {lr}", loc="left")
        axes.set_xlabel(f"update of 16 sequences (lines: mean of {LAST})")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("training loss (nats a token)")
    panels[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
