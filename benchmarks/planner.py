#!/usr/bin/env python3
"""The planner's predictions for a dozen small configurations beside real runs of them.

    .venv/bin/python benchmarks/planner.py [--steps 8] [--output docs/results/planner.json]

Profiles one stage of the model here, predicts memory of every stage and seconds of an iteration
with the planner, and trains each configuration for some steps with Megatron's own loop. Prints a
table and the rank correlations (Spearman) of memory and time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment  # noqa: E402
from scripts.examples.prepare_data import write_dataset  # noqa: E402
from tests.harness import Megatron  # noqa: E402
from tests.harness.planner_cases import (  # noqa: E402
    CASES,
    LARGE,
    Outcome,
    Seconds,
    message_rate,
    outcome,
    profiled,
    rank_correlation,
    seconds,
    this_machine,
)


def main() -> int:
    """Run all and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="iterations of each timed run")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = len(os.sched_getaffinity(0))
    memory, times = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_dataset(folder / "text", max_bytes=512 * 2**10)
        megatron = Megatron(folder, [*data.flags(), "--data-cache-path", str(folder / "cache")])
        try:
            (folder / "profile").mkdir()
            predictor = profiled(megatron, folder / "profile", LARGE, repeats=10)
            for case in CASES:
                memory.append(outcome(megatron, predictor, case, LARGE))
                rate = message_rate(megatron, case, LARGE, folder / "rate.json")
                here = this_machine(predictor, case.pp, rate)
                times.append(
                    seconds(megatron, predictor, here, case, LARGE, arguments.steps, cores)
                )
                print(_line(memory[-1], times[-1]), flush=True)
        finally:
            megatron.close()
    result = _summary(memory, times, cores, sys.argv)
    print(json.dumps({k: v for k, v in result.items() if k != "cases"}, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _line(memory: Outcome, time: Seconds) -> str:
    mib = [
        " ".join(f"{b / 2**20:.1f}" for b in values)
        for values in (memory.predicted_bytes, memory.measured_bytes)
    ]
    case = memory.case
    way = f"BPipe {case.budget or ''}" if case.bpipe else f"{case.partition or '1F1B'}"
    return (
        f"p={case.pp} b={case.micro_batch} {case.attention} {way}: predicted "
        f"{time.predicted:.3f} s ({time.shared:.3f} on these cores), measured "
        f"{time.measured:.3f} s; MiB predicted {mib[0]}, measured {mib[1]}"
    )


def _summary(
    memory: list[Outcome], times: list[Seconds], cores: int, words: list[str]
) -> dict[str, object]:
    def ranks(rows: list[Seconds]) -> float:
        return rank_correlation([t.shared for t in rows], [t.measured for t in rows])

    peaks = [
        [float(b) for o in memory for b in o.predicted_bytes],
        [float(b) for o in memory for b in o.measured_bytes],
    ]
    return {
        "command": " ".join(words),
        "environment": environment() | {"cores": cores},
        "memory_rank_correlation": rank_correlation(*peaks),
        "memory_median_error": statistics.median(
            abs(p / q - 1) for p, q in zip(*peaks, strict=True)
        ),
        "time_rank_correlation": ranks(times),
        "time_rank_correlation_p2": ranks([t for t in times if t.case.pp == 2]),
        "time_rank_correlation_p4": ranks([t for t in times if t.case.pp == 4]),
        "cases": [
            asdict(o) | {k: v for k, v in asdict(t).items() if k != "case"}
            for o, t in zip(memory, times, strict=True)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
