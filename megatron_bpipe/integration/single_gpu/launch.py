"""``--bpipe-rehearsal``: all stages as processes on one GPU.

Real CUDA memory per stage, real streams, BPipe's copies by CUDA IPC; only the speed is not that of
a pipeline, since the stages share the GPU. NCCL refuses two ranks on one device, so every process
group is gloo's. gloo sends host memory only, so pipeline messages go through the host; and it
coalesces collectives of host memory only, so they run one by one (`uncoalesced_collectives.py`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.integration.log import abort

BACKEND = "gloo"


def check_single_gpu(args: Any) -> None:
    """Look whether a rehearsal can run with these arguments.

    Raises:
        Abort: there is no GPU, or a flag that needs one a rank; rank 0 has said which.
    """
    if not torch.cuda.is_available():
        abort(
            "--bpipe-rehearsal runs all stages on one GPU, and there is none; leave it out: "
            "without a GPU all ranks run on the CPU anyway"
        )
    if args.bpipe_transport == "p2p":
        abort(
            "--bpipe-transport p2p cannot run with --bpipe-rehearsal: NCCL refuses two ranks on "
            "one GPU; use ipc or host"
        )


def set_single_gpu(args: Any) -> None:
    """Make Megatron's parsed arguments those of a rehearsal."""
    args.distributed_backend = BACKEND
    args.local_rank = 0
    os.environ["LOCAL_RANK"] = "0"


@dataclass
class _Sent:
    """A message on its way; keeps the host's copy."""

    work: Any
    host: torch.Tensor

    def wait(self) -> None:
        """Return when it has been taken."""
        self.work.wait()


@dataclass
class _Received:
    """A message to come, and where it belongs."""

    work: Any
    host: torch.Tensor
    tensor: torch.Tensor

    def wait(self) -> None:
        """Return when it is there."""
        self.work.wait()
        with torch.no_grad():
            self.tensor.copy_(self.host)


def send_through_host(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.distributed.batch_isend_irecv``, every message through host memory.

    Args:
        stock: torch's.
    """

    @functools.wraps(stock)
    def batch_isend_irecv(ops: Sequence[dist.P2POp]) -> list[Any]:
        requests: list[Any] = []
        for op in ops:
            if op.op is dist.isend:
                host = op.tensor.detach().cpu()  # waits for the current stream
                work = dist.isend(host, op.peer, op.group, op.tag)
                requests.append(_Sent(work, host))
            else:
                host = torch.empty_like(op.tensor, device="cpu", requires_grad=False)
                work = dist.irecv(host, op.peer, op.group, op.tag)
                requests.append(_Received(work, host, op.tensor))
        return requests

    return batch_isend_irecv
