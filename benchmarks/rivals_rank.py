"""One rank of `benchmarks/rivals.py`: Megatron's training, every iteration timed, ops paced.

Environment: RIVALS_OUT, the file that rank 0 writes its seconds to; RIVALS_PACE, JSON with the
seconds that a chunk's ``forward``, ``backward`` and ``weight`` (W) last at least.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "examples" / "pretrain_gpt.py"


def main() -> None:
    """Be the training script."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training

    from megatron_bpipe.integration.patches.split_backward.weight_gradients import WeightGradients

    paces = json.loads(os.environ["RIVALS_PACE"])
    if any(paces.values()):
        for owner, name, seconds in (
            (schedules, "forward_step", paces["forward"]),
            (schedules, "backward_step", paces["backward"]),
            (WeightGradients, "compute", paces["weight"]),
        ):
            setattr(owner, name, paced(getattr(owner, name), seconds))
    training.train_step = timed(training.train_step, Path(os.environ["RIVALS_OUT"]))
    runpy.run_path(str(SCRIPT), run_name="__main__")


def paced(stock: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """``stock`` that lasts ``seconds`` at least: it sleeps what is left, as a GPU would compute.

    In evaluation nothing is paced, there is none here.
    """

    @functools.wraps(stock)
    def lasts(*positional: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = stock(*positional, **named)
        time.sleep(max(0.0, start + seconds - time.perf_counter()))
        return result

    return lasts


def timed(train_step: Callable[..., Any], out: Path) -> Callable[..., Any]:
    """``train_step`` between barriers of all ranks; rank 0 writes the seconds of each."""
    seconds: list[float] = []

    @functools.wraps(train_step)
    def measured(*positional: Any, **named: Any) -> Any:
        _all_here()
        start = time.perf_counter()
        result = train_step(*positional, **named)
        _all_here()
        seconds.append(time.perf_counter() - start)
        if dist.get_rank() == 0:
            out.write_text(json.dumps(seconds))
        return result

    return measured


def _all_here() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    main()
