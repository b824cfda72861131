"""What schedules that split the backward (W) cannot do: flags refused before training."""

from __future__ import annotations

from typing import Any

from megatron_bpipe.integration.checks.refused import given
from megatron_bpipe.integration.log import abort

# attribute of Megatron's arguments: the flag, why it cannot be
REFUSED = {
    "defer_embedding_wgrad_compute": (
        "--defer-embedding-wgrad-compute",
        "W puts the output layer's weight gradient off already",
    ),
    "delay_wgrad_compute": (
        "--delay-wgrad-compute",
        "it belongs to Megatron's combined 1F1B; W sets it where it is needed",
    ),
    "mtp_num_layers": (
        "--mtp-num-layers",
        "tied embeddings then get one part of their gradient in B and one in W",
    ),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "it reduces gradients in the backward"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "it reduces gradients in the backward"),
}


def check_split_backward(args: Any, schedule: str) -> None:
    """Look at Megatron's parsed arguments, and let Transformer Engine's layers defer theirs.

    Raises:
        Abort: W cannot run with one; rank 0 has said which, and why.
    """
    for flag, value, why in given(args, REFUSED):
        abort(f"--bpipe-schedule {schedule} computes W and cannot run with {flag} {value}: {why}")
    if getattr(args, "transformer_impl", "local") == "transformer_engine":
        args.delay_wgrad_compute = True
