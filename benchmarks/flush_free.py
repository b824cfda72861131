#!/usr/bin/env python3
"""The bubble that is left without a flush: Megatron's loop with stages that sleep, on a CPU.

    .venv/bin/python benchmarks/flush_free.py [--stages 4] [--microbatches 8] [--forward 0.1]
        [--backward 0.2] [--output FILE]

Every forward and backward of a tiny GPT first computes, then sleeps until it has taken as long as
is said, so that stages on few cores do not disturb one another. Trained are 1F1B, PipeDream-2BW
with everything that gathers all stages left in (clipping) and without (``--clip-grad 0``, untied
embeddings). Printed is the median iteration beside the time without any bubble, m (F + B), and
1F1B's, (m + p-1)(F + B); the optimizer is on top of both.
"""

from __future__ import annotations

import argparse
import itertools
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

STEPS, WARM = 9, 3  # the last of a run is a flush and does not count either
PLAIN = ["--rerun-mode", "disabled", "--untie-embeddings-and-output-weights"]
PLAIN += ["--log-interval", "1000", "--optimizer", "sgd"]
RUNS = {  # name -> flags beside the model's
    "1F1B": ["--clip-grad", "0"],
    "2BW, clipping": ["--clip-grad", "1.0", "--bpipe-schedule", "pipedream-2bw"],
    "2BW": ["--clip-grad", "0", "--bpipe-schedule", "pipedream-2bw"],
}


def main() -> int:
    """Train all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--forward", type=float, default=0.1, help="seconds")
    parser.add_argument("--backward", type=float, default=0.2, help="seconds")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    given = parser.parse_args()
    p, m, unit = given.stages, given.microbatches, given.forward + given.backward
    ideal, filled = m * unit, (m + p - 1) * unit
    print(f"without a bubble {ideal:.3f} s, 1F1B {filled:.3f} s")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_dataset(folder / "text", max_bytes=512 * 2**10)
        megatron = Megatron(folder, [*data.flags(), "--data-cache-path", str(folder / "cache")])
        try:
            for run, flags in RUNS.items():
                found[run] = seconds(megatron, [*gpt(p, m, None, *PLAIN), *flags], given)
                median = statistics.median(found[run])
                bubble = 1 - ideal / median
                print(f"{run:14} {median:.3f} s, {median / ideal:.3f} of ideal, idle {bubble:.1%}")
        finally:
            megatron.close()
    if given.output is not None:
        document = {"command": sys.argv, "environment": environment(), "seconds": found}
        given.output.write_text(json.dumps(document | {"without_bubble": ideal}, indent=1) + "\n")
    return 0


def seconds(megatron: Megatron, flags: list[str], given: Any) -> list[float]:
    """Of every steady iteration, on the stage that is slowest in the mean."""
    sleep = {
        "call": "benchmarks.flush_free:sleep_in_stages",
        "with": {"forward": given.forward, "backward": given.backward},
    }
    result = megatron.train(
        flags, world=given.stages, steps=STEPS, hooks=[sleep], report=False, timeout=600
    )
    if not result.ok:
        raise RuntimeError(result.logs)
    every = [json.loads(path.read_text()) for path in sorted(result.out.glob("ended*.json"))]
    spans = [[b - a for a, b in itertools.pairwise(ends)] for ends in every]
    slowest: list[float] = max((one[WARM:-1] for one in spans), key=statistics.mean)
    return slowest


def sleep_in_stages(job: dict[str, Any], forward: float, backward: float) -> None:
    """In a rank: let computations last, and write when each step ended."""
    import os
    import time

    from megatron.core.pipeline_parallel import schedules

    from tests.harness.rank import after_each_step

    def lasting(stock: Any, long: float) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            result = stock(*positional, **named)
            time.sleep(max(0.0, long - (time.perf_counter() - begun)))
            return result

        call.__signature__ = __import__("inspect").signature(stock)  # type: ignore[attr-defined]
        return call

    schedules.forward_step = lasting(schedules.forward_step, forward)
    schedules.backward_step = lasting(schedules.backward_step, backward)
    ends: list[float] = []

    def note(step: int, model: Any, result: Any) -> None:
        ends.append(time.perf_counter())
        Path(job["out"], f"ended{os.environ['RANK']}.json").write_text(json.dumps(ends))

    after_each_step(note)


if __name__ == "__main__":
    sys.exit(main())
