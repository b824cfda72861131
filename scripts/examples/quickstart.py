#!/usr/bin/env python3
"""Train one GPT twice over pipeline stages, stock 1F1B and BPipe, and show the difference.

Started by scripts/quickstart.sh. Both runs are Megatron's own ``pretrain()``: on GPUs and with
``--full`` under torchrun, otherwise on processes forked from this one, which has imported Megatron
once. Everything shown is read from what they wrote (runs/quickstart/{stock,bpipe}/memory.json).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked_ranks
from progress import Progress

from megatron_bpipe.simulate.recorded.compare import compare
from megatron_bpipe.simulate.recorded.memory_figure import write_memory_figure

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = Path(__file__).resolve().parent
OUT = ROOT / "runs" / "quickstart"
MIB = 2**20
MICROBATCHES = 8
PROGRESS = re.compile(r"iteration\s+(\d+)/\s*(\d+) .*?lm loss: (\S+)")


FULL_ITERATIONS, ITERATIONS = 20, 8


def main() -> int:
    """Prepare data, run twice, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages (default 4)")
    parser.add_argument(
        "--iterations", type=int, help=f"training steps (default {ITERATIONS}; {FULL_ITERATIONS} "
        "with --full)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="DIR", help="text to train on (default: Python's own)")
    parser.add_argument(
        "--full", action="store_true", help="longer, and under torchrun as on a cluster"
    )
    arguments = parser.parse_args()
    stages, full = arguments.stages, arguments.full
    iterations = arguments.iterations or (FULL_ITERATIONS if full else ITERATIONS)
    if stages < 2:
        parser.error(f"--stages {stages}: a pipeline has at least 2 stages")
    if iterations < 3:
        parser.error(f"--iterations {iterations}: at least 3, to have a median time")
    os.environ.update(
        OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1",
        CUBLAS_WORKSPACE_CONFIG=":4096:8", NCCL_ALGO="Ring",
    )  # fmt: skip
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    on_gpu = _gpus() >= stages
    where = f"{stages} GPUs (NCCL)" if on_gpu else f"{stages} CPU ranks (gloo)"
    print(f"quickstart: {where}; results go to {OUT.relative_to(ROOT)}/", flush=True)
    if not on_gpu:
        print(f"quickstart: will take about {_estimate(stages, iterations, full)}", flush=True)
    start = _under_torchrun if on_gpu or full else _forked
    if start is _forked:
        with (
            Progress("importing Megatron", forked_ranks.MODULES) as progress,
            _warnings_into(OUT / "import.log"),
        ):
            forked_ranks.import_megatron(progress.to)
    command = [*_megatron_flags(stages, iterations, on_gpu), *_dataset(arguments.text)]
    runs = {}
    for name, extra in (("stock", []), ("bpipe", ["--bpipe"])):
        runs[name] = _train(name, start, [*command, *extra], stages, iterations)
    result = _compare(runs["stock"], runs["bpipe"], shlex.join(command))
    (OUT / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    found = compare(OUT / "stock", OUT / "bpipe")
    write_memory_figure(found, OUT / "memory.png")
    print(f"\n{found.text()}\nfiles: {OUT.relative_to(ROOT)}/result.json, memory.png")
    return 0 if result["identical"] else 1


LOOP_SECONDS, IMPORT_SECONDS, START_SECONDS, LAYER_SECONDS = 0.10, 9.0, 1.5, 0.40
"""Of one core: `_estimate`'s loop, importing Megatron, a rank's start, a layer's iteration."""


def _estimate(stages: int, iterations: int, full: bool) -> str:
    """How long it will take here: a small loop tells how fast a core is now."""
    begin = time.perf_counter()
    sum(i * i for i in range(1_500_000))
    slower = (time.perf_counter() - begin) / LOOP_SECONDS
    training = 2 * stages * (START_SECONDS + _layers(stages) // stages * LAYER_SECONDS * iterations)
    importing = IMPORT_SECONDS
    if full:
        training, importing = training + 2 * stages * IMPORT_SECONDS, 0.0
    seconds = slower * (importing + training / min(stages, os.cpu_count() or 1))
    minutes, seconds = divmod(-(-int(seconds) // 10) * 10, 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


@contextlib.contextmanager
def _warnings_into(path: Path) -> Iterator[None]:
    """Megatron names each optional package it does not find: that goes into a file."""
    kept = os.dup(2)
    with path.open("w") as file, warnings.catch_warnings():
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _gpus() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return listing.stdout.count("GPU ")


def _dataset(text: str | None) -> list[str]:
    from prepare_data import write_dataset

    try:
        with _warnings_into(OUT / "dataset.log"):
            data = write_dataset(OUT / "data" / "text", text, max_bytes=2 * MIB)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"quickstart: {data.documents} documents, {data.tokens} tokens (one a byte)", flush=True)
    return [*data.flags(), "--data-cache-path", str(OUT / "data" / "cache")]


def _layers(stages: int) -> int:
    """At least eight, and the same number on every stage."""
    return stages * -(-8 // stages)


def _megatron_flags(stages: int, iterations: int, on_gpu: bool) -> list[str]:
    from megatron_bpipe.integration.cpu.flags import cpu_flags

    layers = _layers(stages)
    flags = f"""
        --pipeline-model-parallel-size {stages} --num-layers {layers} --hidden-size 256
        --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
        --micro-batch-size 2 --global-batch-size {2 * MICROBATCHES} --train-iters {iterations}
        --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --lr-decay-iters {iterations}
        --weight-decay 0.1 --clip-grad 1.0 --init-method-std 0.02
        --attention-dropout 0 --hidden-dropout 0
        --split 100,0,0 --eval-iters 0 --eval-interval 100000 --log-interval 1
        --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
        --seed 1234
    """.split()
    if on_gpu:
        return [*flags, "--bf16", "--deterministic-mode", "--attention-backend", "unfused"]
    return flags + [flag for flag in cpu_flags() if flag not in flags]


Start = Callable[[list[str], int, Callable[[str], None], Callable[[int], None]], list[int]]


def _train(
    name: str, start: Start, flags: list[str], stages: int, iterations: int
) -> dict[str, Any]:
    """Train with a log; what ``--bpipe-report`` wrote."""
    folder, log = OUT / name, OUT / f"{name}.log"
    with Progress(name, 2 * MICROBATCHES * iterations) as progress, log.open("w") as sink:

        def line(text: str) -> None:
            sink.write(text + "\n")
            if found := PROGRESS.search(text):
                progress.to(2 * MICROBATCHES * int(found[1]))
                progress.note(f"iteration {found[1]}/{found[2]}  loss {float(found[3]):.4f}")

        statuses = start([*flags, "--bpipe-report", str(folder)], stages, line, progress.add)
        if any(statuses):
            sink.flush()
            print(f"{name}: failed with status {statuses}; the end of {log}:")
            print("\n".join(log.read_text(encoding="utf-8").splitlines()[-30:]))
            raise SystemExit(1)
    report: dict[str, Any] = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    return report


def _forked(
    flags: list[str], stages: int, line: Callable[[str], None], tick: Callable[[int], None]
) -> list[int]:
    return forked_ranks.train(EXAMPLES / "pretrain_gpt.py", flags, stages, line, tick)


def _under_torchrun(
    flags: list[str], stages: int, line: Callable[[str], None], tick: Callable[[int], None]
) -> list[int]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--log-dir", str(OUT / "torchrun"), "--nproc-per-node", str(stages)]
    command += ["-m", "megatron_bpipe", "run", str(EXAMPLES / "pretrain_gpt.py"), *flags]
    # the data loader's workers leave sockets in the folder for temporary files
    with tempfile.TemporaryDirectory() as temporary:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary},
        )
        assert process.stdout is not None
        for text in process.stdout:
            line(text.rstrip("\n"))
        return [process.wait()]


def _seconds_per_iteration(report: dict[str, Any]) -> float:
    """Median time from one iteration's start to the next one's; the first warms up."""
    starts = [start for start, _ in report["iterations"]]
    return statistics.median(b - a for a, b in itertools.pairwise(starts[1:]))


def _mean_loss(bits: list[str]) -> float:
    """Mean loss of one iteration: each micro-batch reports its sum and its tokens."""
    values = [float.fromhex(b) for b in bits]
    return sum(values[0::2]) / sum(values[1::2])


def _compare(stock: dict[str, Any], bpipe: dict[str, Any], command: str) -> dict[str, Any]:
    times = {"stock": _seconds_per_iteration(stock), "bpipe": _seconds_per_iteration(bpipe)}
    return {
        "identical": bool(stock["losses"]) and stock["losses"] == bpipe["losses"],
        "losses": {n: [_mean_loss(b) for b in r["losses"]] for n, r in _both(stock, bpipe)},
        "loss_bits": {n: r["losses"] for n, r in _both(stock, bpipe)},
        "seconds_per_iteration": times,
        "time_ratio": times["bpipe"] / times["stock"],
        "budget": bpipe["budget"],
        "stock": _memory(stock),
        "bpipe": _memory(bpipe),
        "command": command,
    }


def _memory(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("bpipe", "budget", "stages")}


def _both(stock: dict[str, Any], bpipe: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("stock", stock), ("bpipe", bpipe)]


if __name__ == "__main__":
    sys.exit(main())
