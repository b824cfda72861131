"""Whether Megatron itself can load what the run saves or asks for."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_bpipe.integration.checks.hook_points import DISTRIBUTED_OPTIMIZER
from megatron_bpipe.integration.log import log_rank0


def say_what_cannot_be_resumed(args: Any) -> None:
    """Name the one state that stock Megatron saves and cannot load.

    In every release so far its distributed optimizer asks the optimizer that has not run yet for
    its step (``assert len(steps) == 1``), unless the optimizer is Apex's or Transformer Engine's.

    Args:
        args: Megatron's, parsed.
    """
    if not getattr(args, "use_distributed_optimizer", False):
        return
    if getattr(args, "ckpt_format", "torch") == "torch":
        return
    saves = getattr(args, "save", None) and not getattr(args, "no_save_optim", False)
    skipped = getattr(args, "no_load_optim", False) or getattr(args, "finetune", False)
    loads = getattr(args, "load", None) and not skipped
    distrib_optimizer: Any = importlib.import_module(DISTRIBUTED_OPTIMIZER)
    if not (saves or loads) or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    flag = f"--load {args.load}" if loads else f"--save {args.save}"
    log_rank0(
        f"{flag}: Megatron, stock too, cannot load the state of --use-distributed-optimizer where "
        "neither Apex nor Transformer Engine is installed (distrib_optimizer.py, assert len(steps) "
        "== 1); install one of them, drop --use-distributed-optimizer, or go on without the "
        "optimizer's state with --no-load-optim"
    )
