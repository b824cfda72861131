"""Two hosts on one machine: namespaces for network, names, processes, mounts and shared memory."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import signal
import struct
import subprocess
import time
from collections import deque
from pathlib import Path

from scripts.rehearsals.common import APART

WIRE = "wire"
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h


class Host:
    """One of them."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        """Start it; `connect` gives it its address."""
        self.name, self.address = name, f"10.9.8.{number}"
        names = folder / f"hosts-{number}"
        names.write_text(f"127.0.0.1 localhost\n{self.address} {name}\n")
        Path(f"{names}.ready").unlink(missing_ok=True)  # of a host before this one
        start = (
            f"hostname {name} && mount --make-rprivate / && ip link set lo up"
            " && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /tmp"
            f" && mount --bind {names} /etc/hosts && mount --bind /dev/null /etc/resolv.conf"
            f" && touch {names}.ready; exec sleep infinity"
        )
        # rehearsals write below `folder`, which must not be in /tmp then
        self._keeper = subprocess.Popen([*APART, "sh", "-c", start], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not Path(f"{names}.ready").exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"host {name} did not start")
            time.sleep(0.05)
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
        self.init = int(children.read_text().split()[0])
        # else the last process takes the wire with it, and so the other host's own address
        self._network: int | None = os.open(f"/proc/{self.init}/ns/net", os.O_RDONLY)

    def inside(self, *words: str) -> list[str]:
        """The command that runs ``words`` there."""
        return ["nsenter", "--target", str(self.init), "--all", f"--wdns={os.getcwd()}", *words]

    def do(self, *words: str) -> None:
        """Run ``words`` there."""
        subprocess.run(self.inside(*words), check=True, timeout=60)

    def shared_memory(self) -> list[str]:
        """Names in its /dev/shm."""
        return sorted(os.listdir(f"/proc/{self.init}/root/dev/shm"))

    def processes(self) -> int:
        """How many it has, without the one that keeps it."""
        shown = subprocess.run(
            self.inside("ls", "/proc"), capture_output=True, text=True, timeout=60, check=True
        ).stdout
        return sum(word.isdigit() for word in shown.split()) - 2  # nor the ls

    def shape(self, *words: str) -> None:
        """Slow its end of the wire down, as ``tc qdisc`` says; nothing: as fast as it is."""
        subprocess.run(self.inside("tc", "qdisc", "del", "dev", WIRE, "root"), capture_output=True)
        if words:
            self.do("tc", "qdisc", "add", "dev", WIRE, "root", *words)

    def cut(self) -> None:
        """Let it fall silent: no socket is closed, nothing arrives any more."""
        self.do("ip", "link", "set", WIRE, "down")

    def die(self) -> None:
        """Let all its processes die: its sockets are closed, the other host keeps its address."""
        if self._keeper.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self._keeper.wait(30)

    def end(self) -> None:
        """Switch it off, and take the wire away."""
        self.die()
        if self._network is not None:
            os.close(self._network)
            self._network = None


def connect(one: Host, other: Host, delay: float = 0.0) -> None:
    """A cable between the two; with ``delay`` every frame takes so many seconds longer."""
    for host in (one, other):
        subprocess.run(host.inside("ip", "link", "del", WIRE), capture_output=True, check=False)
    if delay:
        _Delay(one, other, delay).start()
        for host in (one, other):
            _address(host)
        return
    subprocess.run(
        ["ip", "link", "add", "end1", "type", "veth", "peer", "name", "end2"], check=True
    )
    for host, end in ((one, "end1"), (other, "end2")):
        subprocess.run(["ip", "link", "set", end, "netns", str(host.init)], check=True)
        host.do("ip", "link", "set", end, "name", WIRE)
        _address(host)


def _address(host: Host) -> None:
    host.do("ip", "address", "add", f"{host.address}/24", "dev", WIRE)
    host.do("ip", "link", "set", WIRE, "up")


class _Delay(multiprocessing.Process):
    """Carries frames between two taps, each a while after it came: not every kernel has netem."""

    def __init__(self, one: Host, other: Host, seconds: float) -> None:
        super().__init__(daemon=True)  # ends with this process, and the cable with it
        self._seconds = seconds
        self._ends = [self._tap(host) for host in (one, other)]

    @staticmethod
    def _tap(host: Host) -> int:
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{host.init}/ns/net", os.O_RDONLY)
        os.setns(there, os.CLONE_NEWNET)
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", WIRE.encode(), IFF_TAP | IFF_NO_PI))
        finally:
            os.setns(here, os.CLONE_NEWNET)
            os.close(here)
            os.close(there)
        return tap

    def run(self) -> None:
        """Until it is ended."""
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        under_way: deque[tuple[float, int, bytes]] = deque()
        while True:
            rest = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for tap in select.select(self._ends, [], [], rest)[0]:
                under_way.append(
                    (time.monotonic() + self._seconds, other[tap], os.read(tap, 65536))
                )
            while under_way and under_way[0][0] <= time.monotonic():
                _, tap, frame = under_way.popleft()
                with contextlib.suppress(OSError):  # an end that is down: lost, as on a cable
                    os.write(tap, frame)
