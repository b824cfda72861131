"""Whether W can run apart with the arguments (``estimate.refusals`` has why not)."""

from __future__ import annotations

from typing import Any

from megatron_bpipe.estimate.refusals import SPLIT_BACKWARD
from megatron_bpipe.integration.checks.refused import given
from megatron_bpipe.integration.log import abort


def check_split_backward(args: Any, schedule: str) -> None:
    """Look at Megatron's parsed arguments, and let Transformer Engine's layers defer theirs.

    Raises:
        Abort: W cannot run with one; rank 0 has said which, and why.
    """
    for flag, value, why in given(args, SPLIT_BACKWARD):
        abort(f"--bpipe-schedule {schedule} computes W and cannot run with {flag} {value}: {why}")
    if getattr(args, "transformer_impl", "local") == "transformer_engine":
        args.delay_wgrad_compute = True
