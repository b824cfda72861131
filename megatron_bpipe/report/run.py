"""``memory.json``: one run, the worst rank of each stage.  Every field: docs/running/timeline.md.

A new field is added to ``StageReport`` (or ``RunReport``), where it is measured
(``integration/session.py``) and to docs/running/timeline.md; writing and reading follow from here.

Units: bytes; micro-batches of a whole stage (a chunk of v counts 1/v); seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_bpipe.report.fields import AGAIN, ReportError, check_version, load, read
from megatron_bpipe.report.stock import stock_microbatches

VERSION = 2
"""Of ``memory.json``; raised whenever a field changes its meaning or goes."""

DIGEST = "sha256:"  # before what stands for the bits of many floats


@dataclass(frozen=True)
class StageReport:
    """One rank of one stage; in ``memory.json`` the worst of the stage's ranks."""

    stage: int
    rank: int
    own_activation_bytes: int
    own_microbatches: float
    static_bytes: int
    pool_bytes: int = 0
    pool_slots: float = 0
    hosted_bytes: int = 0
    spilled_bytes: int = 0
    evicted_bytes: int = 0
    loaded_bytes: int = 0
    exposed_seconds: float | None = None
    allocator_peak_bytes: int | None = None
    device_bytes: int | None = None
    held_bytes: Sequence[int] | None = None
    leaving_bytes: Sequence[int] | None = None
    working_bytes: int | None = None
    foretold_peak_bytes: int | None = None
    bound_bytes: int | None = None
    transport: str = ""
    stock_microbatches: float | None = None
    left_for_weight_bytes: int | None = None
    forward: dict[str, Any] | None = None

    @property
    def peak_activation_bytes(self) -> int:
        """Its own activations at their most, and the pool it lends all the time."""
        return self.own_activation_bytes + self.pool_bytes

    @property
    def peak_microbatches(self) -> float:
        """The same in micro-batches."""
        return self.own_microbatches + self.pool_slots

    def document(self) -> dict[str, Any]:
        """As it stands in ``memory.json``."""
        peaks = {
            "peak_activation_bytes": self.peak_activation_bytes,
            "peak_microbatches": self.peak_microbatches,
        }
        return asdict(self) | peaks


@dataclass(frozen=True)
class RankReport:
    """What one rank contributes: its stage's figures, and what it knows of the whole run."""

    stage: StageReport
    iterations: Sequence[Sequence[float]]
    losses: Sequence[Sequence[str]]
    microbatches: int
    chunks: int = 1


@dataclass(frozen=True)
class RunReport:
    """The document.

    ``iterations``: start and end of each, seconds since the epoch; ``losses``: per iteration the
    exact bits of every float of the loss reports, in C99 hexadecimal.
    """

    bpipe: bool
    budget: float | None
    p: int
    m: int
    v: int
    stages: tuple[StageReport, ...]
    iterations: Sequence[Sequence[float]]
    losses: Sequence[Sequence[str]]
    schedule: str = "1f1b"
    transport: str = ""
    written: str = ""
    flags: Sequence[str] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    parts: int = 1
    version: int = VERSION

    def text(self) -> str:
        """The JSON text: indented, each iteration's times and losses on one line."""
        document = asdict(self) | {"stages": [stage.document() for stage in self.stages]}
        order = [*("version", "written", "bpipe", "budget", "parts", "p", "m", "v")]
        order += ["schedule", "flags", "transport", "packages", "stages", "iterations", "losses"]
        parts = []
        for name in order:
            value = document[name]
            if name in ("iterations", "losses"):
                rows = ",\n  ".join(json.dumps(list(row)) for row in value)
                shown = f"[\n  {rows}\n ]" if rows else "[]"
            else:
                shown = json.dumps(value, indent=1).replace("\n", "\n ")
            parts.append(f' "{name}": {shown}')
        return "{\n" + ",\n".join(parts) + "\n}\n"


def read_run(folder: Path) -> RunReport:
    """Read ``memory.json`` of a report folder.

    Raises:
        ReportError: naming the file and what is missing, unreadable or of another version.
    """
    path = folder / "memory.json"
    data = load(path)
    check_version(str(path), data, VERSION)
    found = read(RunReport, str(path), data)
    stages = found["stages"]
    if not isinstance(stages, list) or not stages:
        raise ReportError(f"{path}.stages is {stages!r}: {AGAIN}")
    found["stages"] = tuple(
        StageReport(**read(StageReport, f"{path}: stages[{n}]", stage))
        for n, stage in enumerate(stages)
    )
    for n, stage in enumerate(found["stages"]):
        if stage.stage != n:
            raise ReportError(f"{path}: stages[{n}].stage is {stage.stage}: {AGAIN}")
    return RunReport(**found)


def merge(
    ranks: Sequence[RankReport],
    *,
    bpipe: bool,
    budget: float | None,
    schedule: str | None = None,
    parts: int = 1,
    written: str,
    flags: Sequence[str],
    packages: Mapping[str, str],
) -> RunReport:
    """One document from all ranks: of each stage the rank with the highest peak.

    ``schedule`` is its name in the catalogue, None for Megatron's own; ``parts`` in how many an
    activation travelled.
    """
    m, v = max(rank.microbatches for rank in ranks), max(rank.chunks for rank in ranks)
    p = 1 + max(rank.stage.stage for rank in ranks)
    stock = stock_microbatches(p, m, v)
    stages = []
    for x in range(p):
        here = [rank.stage for rank in ranks if rank.stage.stage == x]
        worst = max(here, key=lambda stage: stage.peak_activation_bytes)
        stages.append(replace(worst, stock_microbatches=stock[x]))
    transports = sorted({stage.transport for stage in stages if stage.transport})
    return RunReport(
        bpipe=bpipe,
        budget=budget,
        p=p,
        m=m,
        v=v,
        stages=tuple(stages),
        iterations=ranks[0].iterations,
        losses=next((rank.losses for rank in ranks if rank.losses), []),
        schedule=schedule or ("1f1b" if v == 1 else "interleaved"),
        transport=", ".join(transports),
        written=written,
        flags=tuple(flags),
        packages=packages,
        parts=parts,
    )
