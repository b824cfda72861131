"""How the two ends of a pair talk before there is a transport: by keys of the job's store.

Every wait looks whether the other process still lives, so that a partner that died is an error in
a second, not at the time-out, and ends when this end closes.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_bpipe.runtime.transport.base import TransportError

PAUSES = (0.002, 0.05)  # seconds between two looks: at first, and when it takes long


@dataclass(frozen=True)
class Identity:
    """Where a process is.

    Attributes:
        host: its running kernel.
        namespace: the PID namespace in which ``pid`` means it: two containers of one host may
            have a process of the same number each.
        pid: its number.
        born: when it was started, so that a later process of this number is not taken for it.
    """

    host: str
    namespace: str
    pid: int
    born: str

    @classmethod
    def mine(cls) -> Identity:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        host = boot.read_text().strip() if boot.exists() else platform.node()
        return cls(host, _namespace("self") or "", os.getpid(), _born("self") or "")

    def here(self) -> bool:
        """Whether it is on this host and its memory can be reached from here.

        Its namespace is asked of ``/proc`` under its number. The kernel answers only whoever may
        open the descriptors of that process too, which is how host memory is lent.
        """
        mine = Identity.mine()
        return (
            self.host == mine.host
            and self.namespace == mine.namespace == _namespace(self.pid)
            and _born(self.pid) == self.born
        )

    def died(self) -> bool:
        """Whether it is gone; ask only of one that was `here`."""
        return _born(self.pid) != self.born


@dataclass
class PairRendezvous:
    """One end's view of a pair.

    Args:
        store: shared by both ends.
        pair: the pair's name, the same on both ends, for keys and messages.
        end: ``evictor`` or ``acceptor``, which one this is.
        deadline: seconds to wait for the other end.
        closed: set it to end every wait of this end.
    """

    store: dist.Store
    pair: str
    end: str
    deadline: float
    closed: threading.Event = field(default_factory=threading.Event)
    peer: Identity | None = None

    @property
    def other(self) -> str:
        """The end that this one is not."""
        return "acceptor" if self.end == "evictor" else "evictor"

    def meet(self) -> None:
        """Find the other end as it is now, and have all later keys to ourselves.

        What an earlier run of this pair in this store has left, perhaps half-way, is not taken for
        an answer: each end quotes a number that the other has just drawn.

        Raises:
            TransportError: the other end does not come within the deadline.
        """
        drawn = uuid.uuid4().hex
        if self.end == "evictor":
            self.publish("invitation", drawn)
            answer = self.get(f"answer to {drawn}")
            self.publish(f"agreement to {answer}", drawn)
            both = f"{drawn} {answer}"
        else:
            both = f"{self._answer(drawn)} {drawn}"
        self.store = dist.PrefixStore(both, self.store)

    def exchange_identity(self) -> Identity:
        """Say who this is, learn who the other end is.

        Raises:
            TransportError: the other end does not come within the deadline.
        """
        self.publish("identity", json.dumps(vars(Identity.mine())))
        peer = Identity(**json.loads(self.get("identity")))
        # Where its process cannot be seen there is nothing to watch.
        self.peer = peer if peer.here() else None
        return peer

    def publish(self, what: str, value: str) -> None:
        """Publish something of this end."""
        self.store.set(f"{self.pair}/{self.end}/{what}", value)

    def get(self, what: str) -> str:
        """Wait for something of the other end.

        Raises:
            TransportError: it died, or says nothing within the deadline, or this end is closed.
        """
        key, pause = f"{self.pair}/{self.other}/{what}", PAUSES[0]
        until = time.monotonic() + self.deadline
        while not self._check(key):
            pause = self._pause(what, until, pause)
        return self.store.get(key).decode()

    def check_peer(self) -> None:
        """Look whether the other end still lives, where it can be seen from here.

        Raises:
            TransportError: it died; names the pair.
        """
        if self.peer is not None and self.peer.died():
            raise TransportError(f"pair {self.pair}: the {self.other} (pid {self.peer.pid}) died")

    def _answer(self, drawn: str) -> str:
        """Answer each invitation until one is agreed to; the acceptor's part of `meet`."""
        agreement = f"agreement to {drawn}"
        until, pause, invitation = time.monotonic() + self.deadline, PAUSES[0], ""
        while not self._check(f"{self.pair}/{self.other}/{agreement}"):
            if self._check(f"{self.pair}/{self.other}/invitation"):
                latest = self.get("invitation")
                if latest != invitation:
                    invitation, pause = latest, PAUSES[0]
                    self.publish(f"answer to {invitation}", drawn)
            pause = self._pause("invitation", until, pause)
        return self.get(agreement)

    def _pause(self, what: str, until: float, seconds: float) -> float:
        """Wait a little; returns how long to wait the next time."""
        self.check_peer()
        if time.monotonic() > until:
            raise TransportError(
                f"pair {self.pair}: the {self.other} did not give its {what.split()[0]} within "
                f"{self.deadline:.0f} s; look for an error in its log"
            )
        if self.closed.wait(seconds):
            raise TransportError(f"pair {self.pair}: closed while it waited for the {self.other}")
        return min(1.2 * seconds, PAUSES[1])

    def _check(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except Exception as error:  # the store's host went down
            raise TransportError(f"pair {self.pair}: the job's store is gone ({error})") from error


def _born(pid: int | str) -> str | None:
    """Start time of a process in clock ticks; None if there is none, or only its corpse."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if after_name[0] == "Z" else after_name[19]


def _namespace(pid: int | str) -> str | None:
    """The PID namespace of a process; None if there is none, or this one may not look into it."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
