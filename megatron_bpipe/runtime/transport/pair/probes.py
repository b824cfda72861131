"""What stands in the way of each transport on this machine; "" if nothing does. For the doctor."""

from __future__ import annotations

import os

import torch

from megatron_bpipe.runtime.transport.base import TransportError
from megatron_bpipe.runtime.transport.host.limits import available_bytes
from megatron_bpipe.runtime.transport.pair.rendezvous import Identity


def ipc() -> str:
    """Memory of this GPU, offered the way an acceptor would; who maps it is found out in a run."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    from megatron_bpipe.runtime.transport.cuda.driver import DriverError
    from megatron_bpipe.runtime.transport.cuda.ipc import Trial

    try:
        Trial(torch.device("cuda", torch.cuda.current_device()), "doctor").close()
    except (DriverError, TransportError, OSError) as error:
        return str(error)
    return ""


def shm() -> str:
    """A memfd of this process, opened the way a partner would."""
    try:
        descriptor = os.memfd_create("bpipe-doctor")
        os.posix_fallocate(descriptor, 0, 4096)
        os.close(os.open(f"/proc/{os.getpid()}/fd/{descriptor}", os.O_RDWR))
        os.close(descriptor)
    except OSError as error:
        return str(error)
    return "" if Identity.mine().here() else "it cannot see its own /proc entry"


def p2p() -> str:
    """The backend that the pair's messages would use."""
    dist = torch.distributed
    if torch.cuda.is_available():
        return "" if dist.is_nccl_available() else "this torch has no NCCL"
    return "" if dist.is_gloo_available() else "this torch has no gloo"


def host() -> str:
    """Whether there is host memory at all."""
    return "" if available_bytes() != 0 else "this container has no memory left"
