"""Two hosts with two ranks each under torchrun: transports, placement, hosts and links that fail.

Started by scripts/rehearse_hosts.sh. The hosts are namespaces joined by a virtual cable; all their
traffic stays in there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.rehearsals.common import (
    ROOT,
    TIME_OUT,
    TRAIN,
    Checks,
    dataset,
    environment,
    losses,
    model,
    need,
    parsed,
    run_apart,
)
from scripts.rehearsals.network import WIRE, Host, connect

ITERATIONS = 5
LONG = 400  # what is interrupted must not be over before
RANKS = range(4)
GOES_DOWN = 90  # seconds that ranks and torchrun may take to end, once they have noticed
MEGATRON = ("--bpipe-placement", "megatron")
MEETS_STAGE = re.compile(r"bpipe: rank (\d) \(stage \d of 4\) failed at ([^\n]*)")


@dataclass(frozen=True)
class Outcome:
    """One training: torchrun's status and output on each host, the losses if there are any."""

    statuses: tuple[int, ...]
    logs: tuple[str, ...]
    seconds: float
    losses: list[object] | None

    @property
    def log(self) -> str:
        """Both hosts'."""
        return "\n".join(self.logs)


class Pair:
    """The two hosts and what is trained on them."""

    def __init__(self, folder: Path, names: tuple[str, str] = ("alpha", "beta")) -> None:
        """Start and connect them."""
        self.folder = folder
        self.hosts = tuple(Host(name, i + 1, folder) for i, name in enumerate(names))
        connect(*self.hosts)
        self._runs = 0

    def train(
        self, flags: list[str], during: Callable[[], None] | None = None, seconds: float = 900
    ) -> Outcome:
        """Train on both; ``during`` is called once the third iteration is over.

        It is for what befalls the second host; the first one's end is then waited for.
        """
        self._runs += 1
        report = self.folder / f"{self.hosts[1].name}-{self._runs}"
        rendezvous = f"{self.hosts[0].address}:{29500 + self._runs}"
        running, files = [], []
        for host in self.hosts:
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "rehearsal"]
            command += ["--rdzv-endpoint", rendezvous, "--local-addr", host.address]
            command += ["-m", "megatron_bpipe", "run", str(TRAIN), *flags]
            command += ["--bpipe-report", str(report)]
            files.append(self.folder / f"{report.name}-{host.address}.log")
            with files[-1].open("w") as log:
                running.append(
                    subprocess.Popen(
                        host.inside(*command), stdout=log, stderr=log,
                        env=environment() | {"GLOO_SOCKET_IFNAME": WIRE, "TMPDIR": "/tmp"},
                    )
                )  # fmt: skip
        start = time.monotonic()
        if during is not None:
            while not any(re.search(r"iteration +3/", file.read_text()) for file in files):
                if time.monotonic() - start > seconds:
                    raise TimeoutError("\n".join(file.read_text()[-3000:] for file in files))
                time.sleep(0.1)
            during()
            start = time.monotonic()
        try:
            running[0].wait(seconds)
            if during is not None:  # the other host is dead, or its torchrun waits for this one
                self.end()
            running[1].wait(max(1, seconds - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            self.end()
            said = "\n".join(file.read_text(errors="replace")[-3000:] for file in files)
            raise TimeoutError(f"not over after {seconds:.0f} s:\n{said}") from None
        statuses = tuple(process.wait(30) for process in running)
        found = losses(report) if (report / "memory.json").exists() else None
        logs = tuple(file.read_text(errors="replace") for file in files)
        return Outcome(statuses, logs, time.monotonic() - start, found)

    def end(self) -> None:
        """Switch both off."""
        for host in self.hosts:
            host.end()


def main() -> int:
    """Outside: find out whether it can run, then run inside."""
    arguments = parsed(__doc__)
    if arguments.inside is not None:
        return inside(arguments.inside, arguments.report)
    iproute = dict.fromkeys(("ip", "tc"), "iproute2")
    need(iproute | dict.fromkeys(("unshare", "nsenter"), "util-linux"))
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hosts-", dir=ROOT / "runs") as folder:
        words = [sys.executable, "-m", "scripts.rehearsals.hosts", "--inside", folder]
        if arguments.report is not None:
            words += ["--report", str(arguments.report.resolve())]
        return run_apart(words)


def inside(folder: Path, report: Path | None) -> int:
    """In a namespace of their own: the hosts and their trainings."""
    for words in (["mount", "--make-rprivate", "/"], ["ip", "link", "set", "lo", "up"]):
        subprocess.run(words, check=True)
    checks, data = Checks(), dataset(folder)
    flags = [*model(ITERATIONS), *data]
    pair = Pair(folder)
    stock = pair.train(flags)
    if stock.losses is None:
        raise RuntimeError(f"stock Megatron does not train here:\n{stock.log[-6000:]}")
    flags.append("--bpipe")
    placements(checks, pair, flags, stock.losses)
    links(checks, pair, flags, stock.losses)
    for host in pair.hosts:
        left = (host.processes(), host.shared_memory())
        checks.add(f"{host.name}: left behind", left == (0, []), left)
    pair.end()
    same = Pair(folder, ("twin", "twin"))
    check(checks, "the same hostname twice", same.train([*flags, *MEGATRON]), stock.losses, "p2p")
    same.end()
    flags = [*model(LONG), *data, "--bpipe", *MEGATRON]
    falls_silent(checks, Pair(folder), flags)
    dies(checks, Pair(folder), flags)
    return checks.write(report)


def check(
    checks: Checks, name: str, found: Outcome, expected: list[object], transport: str
) -> None:
    """It trained, over that transport, to the losses of stock Megatron."""
    equal = found.statuses == (0, 0) and found.losses == expected
    took = f"{found.seconds:.0f} s, status {found.statuses}"
    checks.add(f"{name}: losses", equal, f"bitwise those of stock: {equal} ({took})", found.log)
    said = re.search(r"transport (\w+ \([^\n]*\))", found.log)
    used = said[1] if said else "not said"
    checks.add(f"{name}: transport", used.startswith(f"{transport} ("), used, found.log)


def placements(checks: Checks, pair: Pair, flags: list[str], expected: list[object]) -> None:
    """Pairs brought together, left apart, and a transport that cannot reach."""
    placed = pair.train(flags)
    check(checks, "auto", placed, expected, "shm")
    moved = re.search(r"pairs \(evictor, acceptor\) +2 of 2 +0 of 2", placed.log) is not None
    checks.add("auto: pairs across hosts", moved, "2 of 2, placed 0 of 2" if moved else "?")
    check(checks, "Megatron's order", pair.train([*flags, *MEGATRON]), expected, "p2p")
    refused = pair.train([*flags, *MEGATRON, "--bpipe-transport", "shm"])
    reason = r"bpipe: --bpipe-transport shm needs [^\n]*"
    said = re.findall(reason, refused.log)
    checks.add("shm across hosts: refused", 0 not in refused.statuses, refused.statuses)
    trained = re.search(r"iteration +1/", refused.log) is not None
    checks.add(
        "shm across hosts: every rank says why", len(said) >= len(RANKS) and not trained,
        f"{len(said)} of 4: {said[0] if said else 'nothing'}", refused.log,
    )  # fmt: skip


def links(checks: Checks, pair: Pair, flags: list[str], expected: list[object]) -> None:
    """Links that are slow or far."""
    shapes: dict[str, tuple[str, ...]] = {
        "1 Gbit/s": ("tbf", "rate", "1gbit", "burst", "1mb", "latency", "400ms"),
        "40 Mbit/s": ("tbf", "rate", "40mbit", "burst", "64kb", "latency", "2s"),
        "5 ms": (),
    }
    for name, shape in shapes.items():
        for host in pair.hosts:
            host.shape(*shape)
        if not shape:
            connect(*pair.hosts, delay=0.005)
        found = pair.train([*flags, *MEGATRON])
        check(checks, name, found, expected, "p2p")
        warned = re.search(r"pair [^\n]* were waited for [^\n]*", found.log)
        if name == "40 Mbit/s":
            checks.add(f"{name}: warned", warned is not None, warned and warned[0], found.log)
        else:
            print(f"       {name}: {warned[0] if warned else 'no warning'}", flush=True)


def dies(checks: Checks, pair: Pair, flags: list[str]) -> None:
    """All processes of one host die: the other learns it at once."""
    found = pair.train(flags, during=pair.hosts[1].die, seconds=600)
    ends(checks, "a host dies", found, TIME_OUT)
    pair.end()


def falls_silent(checks: Checks, pair: Pair, flags: list[str]) -> None:
    """Its cable is cut: no socket is closed."""
    found = pair.train(flags, during=pair.hosts[1].cut, seconds=600)
    ends(checks, "a host falls silent", found, TIME_OUT + GOES_DOWN)
    pair.end()


def ends(checks: Checks, name: str, found: Outcome, within: float) -> None:
    """The other host's torchrun ends by itself in so many seconds, and its ranks say at what."""
    checks.add(
        f"{name}: the other ends", found.statuses[0] == 1 and found.seconds < within,
        f"status {found.statuses[0]} after {found.seconds:.0f} s", found.logs[0],
    )  # fmt: skip
    said = MEETS_STAGE.findall(found.logs[0])
    ranks = {rank for rank, _ in said}
    checks.add(
        f"{name}: stage and op are named", len(ranks) == 2,
        "; ".join(f"rank {rank} at {op[:60]}" for rank, op in said), found.logs[0],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
