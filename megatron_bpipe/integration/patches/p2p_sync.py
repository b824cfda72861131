"""Messages of the pipeline wait for the computing stream, not for the whole device.

With ``batch_p2p_comm`` and ``batch_p2p_sync``, its defaults, Megatron ends every pipeline message
in ``torch.cuda.synchronize()`` (``P2PCommunicator._communicate``, and ``_communicate_shapes`` with
variable lengths; 0.14 to 0.19 alike). The host would then wait at each message for BPipe's copies
too, whose whole point is that nobody waits for them before their own EW or LW.

So while such a call runs on this thread, ``torch.cuda.synchronize`` waits for the current stream
alone, or for nothing at all. Why waiting for the stream is enough:

- Megatron has the call "to protect against race condition when using batch_isend_irecv()", "to
  work around a bug in older version of PyTorch" (``batch_p2p_sync`` in ``ModelParallelConfig``): a
  tensor might be read, or its memory used again, before NCCL is done with it. Just before it, the
  same function calls ``wait()`` on every request, which makes the current stream wait for the
  message. The host that waits for this stream waits for the message as before.
- Everything Megatron computes from or frees after the message is on that stream, or on one that
  waits for it. Same kernels, same order on the same stream: bitwise the same results.
- What is not waited for any more is work that the current stream does not depend on yet: BPipe's
  copies, and gradient reductions, which have waits of their own.

Why the host need not wait at all, where it does not: the same two reasons. It then launches the
next op while this one still runs, and the time it takes for an eviction or a load is hidden. It
must wait where somebody reads a clock on the host (``--bpipe-report``, ``--timing-log-level 2``),
and where messages are not NCCL's: others go through host memory. `host_waits` decides.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

MESSAGES = frozenset(
    (
        *("recv_forward", "send_forward", "recv_backward", "send_backward"),
        *("send_forward_recv_backward", "send_backward_recv_forward"),
        # with several model chunks
        *("send_forward_recv_forward", "send_backward_recv_backward"),
        "send_forward_backward_recv_forward_backward",
    )
)


def host_waits(group: Any, *, clocked: bool) -> bool:
    """Whether the host must wait at a message for the computation that it is part of.

    Args:
        group: of the pipeline.
        clocked: somebody reads the host's clock before and after messages.
    """
    return clocked or torch.distributed.get_backend(group) != "nccl"


@contextlib.contextmanager
def waits_for_this_stream_only(*, host: bool = True) -> Iterator[None]:
    """``torch.cuda.synchronize()`` of this thread waits for its current stream alone.

    Args:
        host: False: it does not wait at all.
    """
    stock, thread = torch.cuda.synchronize, threading.get_ident()

    def synchronize(device: Any = None) -> None:
        if threading.get_ident() != thread:  # not a call of the communicator
            stock(device)
        elif host:
            torch.cuda.current_stream(device).synchronize()

    torch.cuda.synchronize = synchronize
    try:
        yield
    finally:
        torch.cuda.synchronize = stock


class StreamWaits:
    """A communicator of Megatron's whose messages do not wait for the whole device.

    Args:
        communicator: Megatron's.
        host: whether the host waits for the current stream.
    """

    def __init__(self, communicator: Any, *, host: bool = True) -> None:
        self._communicator = communicator
        self._host = host

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._communicator, name)
        if name not in MESSAGES:
            return found

        def message(*positional: Any, **named: Any) -> Any:
            with waits_for_this_stream_only(host=self._host):
                return found(*positional, **named)

        return message
