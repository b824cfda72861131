"""The acceptor's end of an IPC pair as a process of its own: ``acceptor.py STORE [GPU]``.

Agrees on a transport, lends, and closes when it is told to. Its exit status is 3 if it refused.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.pair import negotiate as pairing
from megatron_bpipe.runtime.transport.pair.rendezvous import Meeting

DEADLINE = 60.0


def meet(path: str, end: str, gpu: int = 0) -> pairing.Pair:
    """One end of the pair, on that GPU."""
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    store = dist.FileStore(path, 2)
    meeting = Meeting(store, "0-1", end, DEADLINE)
    meeting.introduce()
    sight = pairing._look(meeting, device)
    transport, why = pairing.agree("auto", sight, meeting, device)
    return pairing.Pair(meeting, transport, why, device, None, sight.link)


def main() -> int:
    """Lend until told to close."""
    pair = meet(sys.argv[1], "acceptor", *map(int, sys.argv[2:]))
    try:
        lender = pair.lend()
    except TransportError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    pair.meeting.tell("pool", str(lender.pool_bytes))
    pair.meeting.hear("done")
    lender.close()
    pair.meeting.tell("closed", str(lender.pool_bytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
