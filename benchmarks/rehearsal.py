#!/usr/bin/env python3
"""Stock 1F1B, BPipe over ipc and BPipe over host memory, all stages on one GPU.

    python benchmarks/rehearsal.py [--micro-batches 1 2] [--modes stock ipc host] [--output r.json]
    python benchmarks/rehearsal.py --largest-in 16 [--modes stock ipc] [--output largest.json]

What one GPU that all stages share can say, and what it cannot:

- *memory*: each stage's own peak (the caching allocator's, plus the pool it lends) is the real one.
  ``--largest-in GIB`` searches the largest micro-batch whose every stage stays within so much, what
  the caching allocator reserves and does not use included.
- *time*: the stages' kernels queue for one GPU, so an iteration lasts as long as all their work
  together. The ratio to stock is what BPipe adds to that work, not what a pipeline would lose.
- *turns* (``--turns``): only one stage computes at a time, the others wait for it, so every forward
  and backward has the GPU to itself but for its own copies beside it. A turn lasts until both are
  over and includes the host's time for E and L. A stage's turns against the same stage's in stock:
  what BPipe costs a stage of a real pipeline, but for ``stage_captures_s``, which a GPU that is
  behind the host hides.
- *exposed*: how long computing streams stood still for BPipe's copies, by their own events; and
  from a profile of the last iteration on stage 0, how much of the copies between GPU memories ran
  beside kernels (copies to and from the host are gloo's and Megatron's too: not counted).

Exit status 77: no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.environment import NO_GPU, environment  # noqa: E402
from benchmarks.gpu_lock import take_turns  # noqa: E402
from benchmarks.max_fitting import max_fitting  # noqa: E402
from benchmarks.overlap import overlap_of  # noqa: E402
from benchmarks.torchrun import torchrun  # noqa: E402
from megatron_bpipe.integration.cpu.flags import cpu_flags  # noqa: E402

GIB = 2**30
STAGES, MICROBATCHES, WARM = 4, 8, 3
MODES: dict[str, list[str]] = {
    "stock": [],
    "ipc": ["--bpipe", "--bpipe-transport", "ipc"],
    "host": ["--bpipe", "--bpipe-transport", "host"],
}
MODEL = [
    *("--num-layers", "8", "--hidden-size", "2048", "--num-attention-heads", "16"),
    *("--seq-length", "1024", "--max-position-embeddings", "1024", "--bf16", "--lr", "1e-4"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--eval-iters", "0", "--eval-interval", "100000", "--log-interval", "1"),
    *("--split", "100,0,0", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "8191", "--distributed-timeout-minutes", "3"),
    *("--pipeline-model-parallel-size", str(STAGES)),
    *cpu_flags(),
]


def main() -> int:
    """Run every mode at every micro-batch, or be one rank of one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=8, help=f"iterations of a run; {WARM} warm up")
    parser.add_argument("--turns", action="store_true", help="only one stage computes at a time")
    parser.add_argument(
        "--largest-in",
        type=float,
        metavar="GIB",
        help="memory a stage; search, not --micro-batches",
    )
    parser.add_argument("--seconds", type=float, default=180, help="most that one run may take")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--rank-writes-to", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank-limit", type=float, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return NO_GPU
    if arguments.rank_writes_to:
        if arguments.rank_limit:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.rank_limit / total))
        _be_a_rank(arguments.rank_writes_to, flags, arguments.turns, arguments.steps)
        return 0
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    if arguments.steps < WARM + 2:  # one is measured, one profiled
        parser.error(f"--steps {arguments.steps}: give at least {WARM + 2}")
    rows: list[dict[str, Any]] = []

    def run(mode: str, size: int, limit: float = 0.0) -> dict[str, Any]:
        rows.append(_run(arguments, mode, size, limit))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.output:  # what there is, should this end early
            arguments.output.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
        return rows[-1]

    found = None
    if arguments.largest_in:
        limit = arguments.largest_in * GIB
        found = {
            mode: max_fitting(lambda size, mode=mode: _fits(run(mode, size, limit), limit))
            for mode in arguments.modes
        }
    else:
        for size in arguments.micro_batches:
            for mode in arguments.modes:
                run(mode, size)
    result = {
        "environment": environment(),
        "model": " ".join(MODEL),
        "rows": rows,
        "time_ratio_to_stock": _ratios(rows),
        "stage_ratio_to_stock_in_turns": _stage_ratios(rows) if arguments.turns else None,
        "gib_a_stage": arguments.largest_in,
        "largest_micro_batch": found,
        "sequences_per_second_there": found and _speeds(rows, found),
    }
    shown = {key: value for key, value in result.items() if key not in ("rows", "model")}
    print(json.dumps(shown, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    # in a search it is right that the largest tried did not fit
    done = all(found.values()) if found else all("error" not in row for row in rows)
    return 0 if done else 1


def _run(given: argparse.Namespace, mode: str, size: int, limit: float) -> dict[str, Any]:
    row: dict[str, Any] = {"mode": mode, "micro_batch": size}
    seconds = given.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*MODEL, *MODES[mode], "--bpipe-rehearsal", "--bpipe-report", str(folder)]
        flags += ["--micro-batch-size", str(size), "--global-batch-size", str(MICROBATCHES * size)]
        flags += ["--train-iters", str(given.steps)]
        words = [__file__, "--rank-writes-to", name, "--rank-limit", str(limit)]
        words += ["--steps", str(given.steps), *["--turns"] * given.turns]
        log = folder / "log"
        code = torchrun([*words, *flags], STAGES, seconds, log, {})
        if code != 0:
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()
            out = [line for line in said if "OutOfMemory" in line or "out of memory" in line]
            status = f"not over after {seconds:.0f} s" if code is None else f"status {code}"
            error = f"{status}: {' | '.join(out[:1] or said[-5:])}"
            return row | {"error": error, "out_of_memory": bool(out)}
        return row | _read(folder)


def _read(folder: Path) -> dict[str, Any]:
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(STAGES)]
    report = json.loads((folder / "memory.json").read_text())
    pools = [stage["pool_bytes"] for stage in report["stages"]]
    seconds = statistics.median(ranks[0]["seconds"][WARM:-1])  # the last one is profiled
    exposed = []
    for path in sorted(folder.glob("timeline-stage*.json")):
        iteration = json.loads(path.read_text())["iterations"][-2]
        exposed.append(sum(event["exposed"] or 0.0 for event in iteration))
    peaks = [rank["reserved_bytes"] + pool for rank, pool in zip(ranks, pools, strict=True)]
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    overlap = overlap_of(trace, ("DtoD", "PtoP"))
    return {
        "seconds_per_iteration": seconds,
        "stage_peak_bytes": peaks,
        "allocated_peak_bytes": [rank["allocated_bytes"] for rank in ranks],
        "fragmentation": [r["reserved_bytes"] / max(1, r["allocated_bytes"]) for r in ranks],
        "pool_bytes": pools,
        "hosted_bytes": [stage["hosted_bytes"] for stage in report["stages"]],
        "stage_turns_s": [statistics.median(rank["turns"][WARM:-1]) for rank in ranks],
        "stage_captures_s": [statistics.median(rank["captures"][WARM:-1]) for rank in ranks],
        "exposed_s": exposed,
        "exposed_share": [wait / seconds for wait in exposed],
        "stage_0_profile_us": vars(overlap),
        "losses": report["losses"],
    }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    stock = {r["micro_batch"]: r for r in rows if r["mode"] == "stock" and "error" not in r}
    found = {}
    for row in rows:
        other = stock.get(row["micro_batch"])
        if row["mode"] != "stock" and "error" not in row and other is not None:
            name = f"{row['mode']}, micro-batch {row['micro_batch']}"
            found[name] = row["seconds_per_iteration"] / other["seconds_per_iteration"]
    return found


def _stage_ratios(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    stock = {r["micro_batch"]: r for r in rows if r["mode"] == "stock" and "error" not in r}
    found = {}
    for row in rows:
        other = stock.get(row["micro_batch"])
        if row["mode"] != "stock" and "error" not in row and other is not None:
            own = zip(row["stage_turns_s"], other["stage_turns_s"], strict=True)
            name = f"{row['mode']}, micro-batch {row['micro_batch']}"
            found[name] = [turns / alone for turns, alone in own]
    return found


def _fits(row: dict[str, Any], limit: float) -> bool:
    """Whether every stage, what it lends included, stayed within ``limit`` bytes.

    Raises:
        RuntimeError: it failed, and not for want of memory.
    """
    if "error" not in row:
        return bool(max(row["stage_peak_bytes"]) <= limit)
    if not row["out_of_memory"]:
        raise RuntimeError(f"{row['mode']}, micro-batch {row['micro_batch']}: {row['error']}")
    return False


def _speeds(rows: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, float]:
    return {
        row["mode"]: row["micro_batch"] * MICROBATCHES / row["seconds_per_iteration"]
        for row in rows
        if row["micro_batch"] == sizes[row["mode"]]
    }


def _be_a_rank(folder: Path, flags: list[str], turns: bool, steps: int) -> None:
    from megatron_bpipe.integration.bootstrap.run_script import run_script
    from megatron_bpipe.integration.patches.import_hook import after_import

    seconds: list[float] = []
    in_turns: list[float] = []  # seconds of this stage's turns, one entry an iteration
    captures: list[float] = []

    def observe(training: Any) -> None:
        import torch.distributed as dist
        from torch.profiler import ProfilerActivity, profile

        stock = training.train_step

        def train_step(*positional: Any, **named: Any) -> Any:
            last = len(seconds) == steps - 1
            profiled = last and dist.get_rank() == 0
            profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            torch.cuda.synchronize()
            dist.barrier()
            in_turns.append(0.0)
            captures.append(0.0)
            begun = time.perf_counter()
            if profiled:
                profiler.start()
            result = stock(*positional, **named)
            torch.cuda.synchronize()
            if profiled:
                profiler.stop()
            dist.barrier()
            seconds.append(time.perf_counter() - begun)
            if last:
                if profiled:
                    profiler.export_chrome_trace(str(folder / "trace.json"))
                path = folder / f"rank{dist.get_rank()}.json"
                path.write_text(
                    json.dumps(
                        {
                            "seconds": seconds,
                            "turns": in_turns,
                            "captures": captures,
                            "reserved_bytes": torch.cuda.max_memory_reserved(),
                            "allocated_bytes": torch.cuda.max_memory_allocated(),
                        }
                    )
                )
            return result

        training.train_step = train_step

    after_import("megatron.training.training", observe)
    if turns:
        after_import(
            "megatron.core.pipeline_parallel.schedules",
            lambda schedules: take_turns(schedules, folder / "turn", in_turns, captures),
        )
    run_script(str(ROOT / "scripts" / "examples" / "pretrain_gpt.py"), flags)


if __name__ == "__main__":
    sys.exit(main())
