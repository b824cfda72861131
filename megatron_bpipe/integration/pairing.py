"""Choose a pair's transport and open both of its ends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..runtime.transport import Lender, Transport, TransportError
from ..runtime.transport.meeting import Meeting
from ..runtime.transport.shared_memory import SharedMemoryLender, SharedMemoryTransport
from ..runtime.transport.two_sided import TwoSidedLender, TwoSidedTransport


@dataclass
class Pair:
    """This rank's end of its pair, after both ends have agreed on a transport.

    Attributes:
        meeting: the line to the other end.
        transport: ``shm`` or ``p2p``.
        group: the pair's process group, for ``p2p``.
    """

    meeting: Meeting
    transport: str
    group: Any

    def borrow(self, microbatch_bytes: int, slots: int) -> Transport:
        """The evictor's end."""
        if self.transport == "shm":
            return SharedMemoryTransport(self.meeting, microbatch_bytes * slots)
        return TwoSidedTransport(self.group, self.meeting.pair, self.meeting.deadline)

    def lend(self, device: torch.device) -> Lender:
        """The acceptor's end."""
        meeting = self.meeting
        if self.transport == "shm":
            return SharedMemoryLender(meeting)
        return TwoSidedLender(self.group, meeting.pair, device, meeting.deadline)


def open_pair(group: Any, evictor: int, asked: str, deadline: float) -> Pair:
    """Meet the partner and agree; both ends call it at their first iteration.

    Args:
        group: the pipeline's process group.
        evictor: stage of the pair's evictor.
        asked: ``auto``, ``shm`` or ``p2p``.
        deadline: seconds that any wait may take.

    Raises:
        TransportError: the partner does not come, or ``shm`` was asked for and the two ranks do
            not share a host.
    """
    stages = (evictor, group.size() - 1 - evictor)
    ranks = [dist.get_global_rank(group, stage) for stage in stages]
    end = "evictor" if group.rank() == evictor else "acceptor"
    pair = f"{ranks[0]}-{ranks[1]}"
    store = _store(pair, end, deadline)
    meeting = Meeting(store, pair, end, deadline)
    meeting.introduce()
    if end == "evictor":
        meeting.tell("transport", _choose(asked, meeting))
        transport = meeting.hear("transport")
    else:
        transport = meeting.hear("transport")
        meeting.tell("transport", transport)
    if transport == "refused":
        raise TransportError(
            f"pair {meeting.pair}: --bpipe-transport shm, but its ranks share no host (or no PID "
            "namespace); place pairs on one node, or use p2p"
        )
    messages = None
    if transport == "p2p":
        messages = two_sided_group(store, meeting.pair, int(end == "acceptor"), deadline)
    return Pair(meeting, transport, messages)


def two_sided_group(store: Any, pair: str, rank: int, deadline: float) -> Any:
    """A process group of two, evictor 0 and acceptor 1, unknown to torch's registry of groups.

    ``new_group`` would have to be called by every rank of the job, and its variant that need not
    (``use_local_synchronization``) names groups by how many the calling rank is in, which differs
    between a pipeline's ends.
    """
    own = dist.PrefixStore(f"{pair}/group", store)
    timeout = timedelta(seconds=deadline)
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(own, rank, 2, options)
    return dist.ProcessGroupGloo(own, rank, 2, timeout)


def _choose(asked: str, meeting: Meeting) -> str:
    if asked == "auto":
        return "shm" if meeting.peer is not None else "p2p"
    return "refused" if asked == "shm" and meeting.peer is None else asked


def _store(pair: str, end: str, deadline: float) -> Any:
    """The job's store, in a corner that no earlier meeting of this pair has written to."""
    base: Any = dist.distributed_c10d._get_default_store()
    # its own connection: a wait here must not hold up c10d's own requests
    store = dist.PrefixStore("megatron_bpipe", base.clone())
    store.set_timeout(timedelta(seconds=deadline))
    times_met = store.add(f"{pair}/{end}/times", 1)
    return dist.PrefixStore(str(times_met), store)
