"""An MFU line in Megatron's training log, and ``bpipe/*`` scalars for TensorBoard and W&B.

Every scalar is described in docs/running/timeline.md. MFU counts the matrix multiplications of the
model that is trained (`estimate/time/flops.py`), over the GPU's dense bf16 peak; without a
published peak there is no line. Line and scalars are written by the rank and at the interval that
Megatron itself logs at.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.estimate.time.flops import matmul_flops
from megatron_bpipe.integration.link_forecast import gpu_here
from megatron_bpipe.integration.model_from_args import model_of
from megatron_bpipe.integration.session import Session
from megatron_bpipe.integration.session_report import counters

MIB, GIB = 2**20, 2**30
UNKNOWN = -1.0


@dataclass
class _Clock:
    """Iterations since the last line."""

    began: float
    iterations: int = 0
    sequences: int = 0


def make_logging(training_log: Callable[..., Any], training: Any, session: Session) -> Any:
    """``training_log`` with one more line after its own."""
    signature = inspect.signature(training_log)
    clock: _Clock | None = None

    @functools.wraps(training_log)
    def training_log_with_bpipe(*positional: Any, **named: Any) -> Any:
        nonlocal clock
        result = training_log(*positional, **named)
        iteration = signature.bind(*positional, **named).arguments["iteration"]
        args = training.get_args()
        now = time.perf_counter()
        if clock is None:  # the first iteration warms up and counts for nobody
            clock = _Clock(now)
            return result
        clock.iterations += 1
        clock.sequences += training.get_current_global_batch_size()
        if iteration % args.log_interval == 0:
            seconds = (now - clock.began) / clock.iterations
            scalars = _speed(args, clock.sequences / clock.iterations, seconds)
            if "bpipe/mfu_percent" in scalars:
                training.print_rank_last(_line(iteration, seconds, scalars))
            # every rank has the same arguments, so all of them take part or none does
            if getattr(args, "tensorboard_dir", None) or getattr(args, "wandb_project", None):
                _write(training, iteration, scalars | _moved(session, args))
            clock = _Clock(now)
        return result

    return training_log_with_bpipe


def _speed(args: Any, sequences: float, seconds: float) -> dict[str, float]:
    model = model_of(args)
    if model is None:
        return {}
    per_gpu = matmul_flops(model, 1) * sequences / seconds / args.world_size
    scalars = {"bpipe/tflops_per_gpu": per_gpu / 1e12}
    gpu = gpu_here()
    if gpu is not None:
        scalars["bpipe/mfu_percent"] = 100 * per_gpu / gpu.flops
    return scalars


def _moved(session: Session, args: Any) -> dict[str, float]:
    """Memory and transfers of all stages, of each stage the worst rank; a collective of all."""
    names = ("peak", "allocated", "pool", "evicted", "exposed", "spilled")
    stages = args.pipeline_model_parallel_size
    device = torch.device(torch.cuda.current_device())
    table = torch.full((stages, len(names)), UNKNOWN, dtype=torch.float64, device=device)
    seen = counters(session)
    if seen is not None:
        row = [getattr(seen, name) for name in names]
        row = [UNKNOWN if value is None else value for value in row]
        table[seen.stage] = torch.tensor(row, dtype=torch.float64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    columns = {name: table[:, n].tolist() for n, name in enumerate(names)}
    scalars: dict[str, float] = {}
    if session.plan is not None and session.plan.budget is not None:
        scalars["bpipe/budget"] = session.plan.budget
    for name in ("peak", "allocated"):
        for stage, value in enumerate(columns[name]):
            if value != UNKNOWN:
                scalars[f"bpipe/{name}_mib/stage_{stage}"] = value / MIB
    known = {n: [v for v in values if v != UNKNOWN] for n, values in columns.items()}
    if known["evicted"]:
        scalars["bpipe/pool_mib"] = max(known["pool"]) / MIB
        scalars["bpipe/evicted_gib"] = sum(known["evicted"]) / GIB
        scalars["bpipe/spilled_bytes"] = sum(known["spilled"])
    if known["exposed"]:
        scalars["bpipe/exposed_ms"] = 1000 * max(known["exposed"])
    return scalars


def _line(iteration: int, seconds: float, scalars: dict[str, float]) -> str:
    return (
        f"bpipe: iteration {iteration}: MFU {scalars['bpipe/mfu_percent']:.1f} %, "
        f"{scalars['bpipe/tflops_per_gpu']:.4g} TFLOP/s a GPU (the model's matrix "
        f"multiplications, attention in full), {seconds:.4f} s an iteration"
    )


def _write(training: Any, iteration: int, scalars: dict[str, float]) -> None:
    writer = training.get_tensorboard_writer()
    if writer is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    wandb = training.get_wandb_writer()
    if wandb:
        wandb.log(scalars, iteration)
