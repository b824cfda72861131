"""How the two ends of a pair find each other: through the job's store, with a live peer.

Both ends first say who they are; every later wait looks whether the other one still lives, so that
a partner that died is an error in a second, not at the time-out.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_bpipe.runtime.transport.base import TransportError


class KeyValueStore(Protocol):
    """The part of torch.distributed's store that is used here."""

    def set(self, key: str, value: str) -> None:
        """Publish ``value``."""

    def get(self, key: str) -> bytes:
        """The value of ``key``; waits for it."""

    def check(self, keys: list[str]) -> bool:
        """Whether all ``keys`` are there."""


@dataclass(frozen=True)
class Identity:
    """Where a process is: host (its running kernel), pid, and when that pid was born."""

    host: str
    pid: int
    born: str

    @classmethod
    def mine(cls) -> Identity:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        host = boot.read_text().strip() if boot.exists() else platform.node()
        return cls(host, os.getpid(), _born(os.getpid()) or "")

    def here(self) -> bool:
        """Whether it is on this host and visible from here (one PID namespace)."""
        return self.host == Identity.mine().host and _born(self.pid) == self.born

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
    """

    store: KeyValueStore
    pair: str
    end: str
    deadline: float
    peer: Identity | None = None

    def exchange_identity(self) -> Identity:
        """Say who this is, learn who the other end is.

        Raises:
            TransportError: the other end does not come within the deadline.
        """
        self.publish("identity", json.dumps(vars(Identity.mine())))
        peer = Identity(**json.loads(self.get("identity")))
        # Where /proc shows no such process it lives in another namespace: nothing to watch.
        self.peer = peer if peer.here() else None
        return peer

    def publish(self, what: str, value: str) -> None:
        """Publish something of this end."""
        self.store.set(f"{self.pair}/{self.end}/{what}", value)

    def get(self, what: str) -> str:
        """Wait for something of the other end.

        Raises:
            TransportError: it died, or says nothing within the deadline.
        """
        other = "acceptor" if self.end == "evictor" else "evictor"
        key = f"{self.pair}/{other}/{what}"
        until = time.monotonic() + self.deadline
        while not self._check(key):
            self.check_peer()
            if time.monotonic() > until:
                raise TransportError(
                    f"pair {self.pair}: the {other} did not give its {what} within "
                    f"{self.deadline:.0f} s; look for an error in its log"
                )
            time.sleep(0.002)
        return self.store.get(key).decode()

    def check_peer(self) -> None:
        """Look whether the other end still lives, where it can be seen from here.

        Raises:
            TransportError: it died; names the pair.
        """
        if self.peer is not None and self.peer.died():
            other = "acceptor" if self.end == "evictor" else "evictor"
            raise TransportError(f"pair {self.pair}: the {other} (pid {self.peer.pid}) died")

    def _check(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except Exception as error:  # the store's host went down
            raise TransportError(f"pair {self.pair}: the job's store is gone ({error})") from error


def _born(pid: int) -> str | None:
    """Start time of a process in clock ticks; None if there is none, or only its corpse."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if after_name[0] == "Z" else after_name[19]
