"""The acceptor's end of an IPC pair as a process of its own: ``acceptor.py STORE [GPU]``.

Agrees on a transport, lends, and closes when it is told to. Its exit status is 3 if it refused.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.pair.handshake import LentPool, PairEnd

DEADLINE = 60.0


def end_of(path: str, end: str, gpu: int = 0) -> PairEnd:
    """One end of the pair, on that GPU."""
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    store = dist.FileStore(path, 2)
    return PairEnd("0-1", end, "auto", device, DEADLINE, store)


def main() -> int:
    """Lend until told to close."""
    end = end_of(sys.argv[1], "acceptor", *map(int, sys.argv[2:]))
    lent = LentPool(end)
    try:
        lent.open()
    except TransportError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    end.store.set("pool", str(lent.pool_bytes))
    end.store.get("done")
    lent.close()
    end.store.set("closed", "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
