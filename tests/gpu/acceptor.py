"""The acceptor's end of an IPC pair as a process of its own: ``acceptor.py STORE [GPU]``.

Agrees on a transport, lends, and closes when it is told to. Its exit status is 3 if it refused.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.pair import negotiate as pairing
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous

DEADLINE = 60.0


def meet(path: str, end: str, gpu: int = 0) -> pairing.Pair:
    """One end of the pair, on that GPU."""
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    store = dist.FileStore(path, 2)
    rendezvous = PairRendezvous(store, "0-1", end, DEADLINE)
    rendezvous.exchange_identity()
    topology = pairing._look(rendezvous, device)
    transport, why = pairing.agree("auto", topology, rendezvous, device)
    return pairing.Pair(rendezvous, transport, why, device, None, topology.link)


def main() -> int:
    """Lend until told to close."""
    pair = meet(sys.argv[1], "acceptor", *map(int, sys.argv[2:]))
    try:
        acceptor_end = pair.open_acceptor()
    except TransportError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    pair.rendezvous.publish("pool", str(acceptor_end.pool_bytes))
    pair.rendezvous.get("done")
    acceptor_end.close()
    pair.rendezvous.publish("closed", str(acceptor_end.pool_bytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
