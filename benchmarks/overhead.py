#!/usr/bin/env python3
"""What BPipe costs on a CPU: stock and BPipe blocks of iterations, alternating in one training run.

    .venv/bin/python benchmarks/overhead.py [--pairs 12] [--block 3] [--stages 4] [--chunks 1]
        [--parts 4]

One run of Megatron's `pretrain()`; between blocks only the schedule function is exchanged, so both
see the same processes, caches and neighbours. Prints medians and spread of wall seconds and of CPU
seconds summed over ranks, and writes benchmarks' numbers with the environment to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODEL = [
    *("--num-layers", "8", "--hidden-size", "256", "--num-attention-heads", "4"),
    *("--seq-length", "256", "--max-position-embeddings", "256"),
    *("--micro-batch-size", "2", "--global-batch-size", "16", "--lr", "1e-4"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--eval-iters", "0", "--eval-interval", "100000", "--log-interval", "1000"),
    *("--split", "100,0,0", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "257", "--distributed-timeout-minutes", "5"),
]


def main() -> int:
    """Start the run, or be one of its ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="alternating pairs of blocks")
    parser.add_argument("--block", type=int, default=3, help="iterations a block")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=1, help="model chunks a stage")
    parser.add_argument("--parts", type=int, help="of an activation (default: the flag's own)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--rank-writes-to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_writes_to:
        _be_a_rank(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--log-dir", folder, "--nproc-per-node", str(arguments.stages), __file__]
        command += ["--pairs", str(arguments.pairs), "--block", str(arguments.block)]
        command += ["--stages", str(arguments.stages), "--chunks", str(arguments.chunks)]
        command += ["--parts", str(arguments.parts)] if arguments.parts else []
        command += ["--rank-writes-to", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["TMPDIR"] = folder  # the data loader's workers leave sockets there
        subprocess.run(command, env=environment, check=True, timeout=3600)
        files = sorted(Path(folder).glob("rank*.json"))
        ranks = [json.loads(path.read_text()) for path in files]
    result = _summarise(ranks, arguments)
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _be_a_rank(arguments: argparse.Namespace) -> None:
    from megatron_bpipe.integration import install
    from megatron_bpipe.integration.bootstrap.run_script import run_script
    from megatron_bpipe.integration.checks.hook_points import (
        FORWARD_BACKWARD,
        FORWARD_BACKWARD_INTERLEAVED,
    )
    from megatron_bpipe.integration.cpu.flags import cpu_flags
    from megatron_bpipe.integration.patches.import_hook import after_import

    point = FORWARD_BACKWARD if arguments.chunks == 1 else FORWARD_BACKWARD_INTERLEAVED
    replaced = point.name
    steps = arguments.block * 2 * (arguments.pairs + 1)  # the first pair warms up
    rows: list[dict[str, Any]] = []

    def alternate(training: Any) -> None:
        import torch.distributed as dist
        from megatron.core.pipeline_parallel import schedules

        stock_step = training.train_step
        choices: list[Any] = []

        def train_step(*positional: Any, **named: Any) -> Any:
            bpipe = (len(rows) // arguments.block) % 2 == 1
            if not choices:  # the arguments are parsed by now, so the schedule is replaced
                patches = install._installed
                assert patches is not None
                choices.append(patches.stock[replaced])
                choices.append(getattr(schedules, replaced))
            setattr(schedules, replaced, choices[bpipe])
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            result = stock_step(*positional, **named)
            dist.barrier()
            rows.append(
                {
                    "bpipe": bpipe,
                    "wall": time.perf_counter() - wall,
                    "cpu": time.process_time() - cpu,
                }
            )
            if len(rows) == steps:
                path = arguments.rank_writes_to / f"rank{dist.get_rank()}.json"
                path.write_text(json.dumps(rows))
            return result

        training.train_step = train_step

    after_import("megatron.training.training", alternate)
    flags = [*MODEL, "--bpipe", "--pipeline-model-parallel-size", str(arguments.stages)]
    if arguments.chunks > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", str(arguments.chunks)]
    flags += ["--bpipe-parts", str(arguments.parts)] if arguments.parts else []
    flags += ["--train-iters", str(steps), *cpu_flags()]
    run_script(str(ROOT / "scripts" / "examples" / "pretrain_gpt.py"), flags)


def _summarise(ranks: list[list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    block = arguments.block
    wall = [max(r[i]["wall"] for r in ranks) for i in range(len(ranks[0]))]
    cpu = [sum(r[i]["cpu"] for r in ranks) for i in range(len(ranks[0]))]
    result: dict[str, Any] = {
        "command": f"benchmarks/overhead.py --pairs {arguments.pairs} --block {block} "
        f"--stages {arguments.stages}"
        + (f" --chunks {arguments.chunks}" if arguments.chunks > 1 else "")
        + (f" --parts {arguments.parts}" if arguments.parts else ""),
        "model": " ".join(MODEL),
        "environment": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "OMP_NUM_THREADS": 1,
        },
    }
    for name, values in (("wall_seconds", wall), ("cpu_seconds_all_ranks", cpu)):
        # one figure a block: the mean of its iterations
        blocks = [statistics.fmean(values[i : i + block]) for i in range(0, len(values), block)]
        stock, bpipe = blocks[2::2], blocks[3::2]
        ratios = [b / a for a, b in zip(stock, bpipe, strict=True)]
        result[name] = {
            "stock": _spread(stock),
            "bpipe": _spread(bpipe),
            "ratio": _spread(ratios),
        }
    return result


def _spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": round(statistics.median(values), 4),
        "quartile_1": round(quarters[0], 4),
        "quartile_3": round(quarters[2], 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
