"""An MFU line in Megatron's training log, and ``bpipe/*`` scalars for TensorBoard and W&B.

MFU is the paper's: equation 1 (arXiv 2401.02088), as printed, over the GPU's dense bf16 peak. It
is written by the rank and at the interval that Megatron itself logs at.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bpipe.estimate.models import gpt
from megatron_bpipe.estimate.time.flops import equation_1
from megatron_bpipe.integration.link_forecast import gpu_here
from megatron_bpipe.integration.session import Session


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
    def training_log_with_mfu(*positional: Any, **named: Any) -> Any:
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
            scalars = _scalars(args, clock.sequences / clock.iterations, seconds, session)
            training.print_rank_last(_line(iteration, seconds, scalars))
            _write(training, iteration, scalars)
            clock = _Clock(now)
        return result

    return training_log_with_mfu


def _scalars(args: Any, sequences: float, seconds: float, session: Session) -> dict[str, float]:
    model = gpt(
        "run",
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        layers=args.num_layers,
        seq=args.seq_length,
        vocab=args.padded_vocab_size,
    )
    per_gpu = equation_1(model, 1) * sequences / seconds / args.world_size
    scalars = {"bpipe/tflops_per_gpu": per_gpu / 1e12}
    gpu = gpu_here()
    if gpu is not None:
        scalars["bpipe/mfu_percent"] = 100 * per_gpu / gpu.flops
    if session.plan is not None:
        scalars["bpipe/budget"] = session.plan.budget
    if session.acceptor_end is not None:
        scalars["bpipe/pool_mib"] = session.acceptor_end.pool_bytes / 2**20
    return scalars


def _line(iteration: int, seconds: float, scalars: dict[str, float]) -> str:
    mfu = scalars.get("bpipe/mfu_percent")
    shown = f"MFU {mfu:.1f} %" if mfu is not None else "MFU unknown (no peak known for this device)"
    return (
        f"bpipe: iteration {iteration}: {shown}, {scalars['bpipe/tflops_per_gpu']:.4g} TFLOP/s a "
        f"GPU (equation 1), {seconds:.4f} s an iteration"
    )


def _write(training: Any, iteration: int, scalars: dict[str, float]) -> None:
    writer = training.get_tensorboard_writer()
    if writer is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    wandb = training.get_wandb_writer()
    if wandb:
        wandb.log(scalars, iteration)
