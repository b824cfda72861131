"""``timeline-stageSSS-rankRRRRR.json``: the ops of one rank's last iterations.

Units: seconds since the epoch, bytes, micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bpipe.report.fields import AGAIN, ReportError, check_version, load, read

VERSION = 2
"""Of the timeline files."""


@dataclass(frozen=True)
class Event:
    """One op of a recorded iteration; see docs/running/timeline.md."""

    op: str
    start: float  # seconds since the epoch
    end: float
    bytes: int  # moved by E and L; 0 otherwise
    live_bytes: int  # activations in this stage's memory when the op was over
    live_microbatches: float
    copy_start: float | None = None  # EW, LW: when the copy itself ran
    copy_end: float | None = None
    exposed: float | None = None  # EW, LW: seconds that the computation waited for the copy


@dataclass(frozen=True)
class Timeline:
    """One rank."""

    stage: int
    rank: int
    iterations: Sequence[Sequence[Event]]

    @property
    def file_name(self) -> str:
        """Where it lies in the report's folder."""
        return f"timeline-stage{self.stage:03d}-rank{self.rank:05d}.json"

    def text(self) -> str:
        """The JSON text, one event a line."""
        iterations = ",\n".join(
            "[\n" + ",\n".join(json.dumps(asdict(event)) for event in events) + "\n]"
            for events in self.iterations
        )
        head = json.dumps({"version": VERSION, "stage": self.stage, "rank": self.rank})
        return f'{head[:-1]}, "iterations": [\n{iterations}\n]}}\n'


def read_timelines(folder: Path, stages: int) -> list[Timeline]:
    """The lowest rank of each stage.

    Raises:
        ReportError: naming the file that is missing or not what ``--bpipe-report`` writes.
    """
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("timeline-stage*.json"), reverse=True):
        files[int(path.name[len("timeline-stage") :].split("-")[0])] = path
    missing = sorted(set(range(stages)) - set(files))
    if missing:
        raise ReportError(
            f"{folder}: memory.json has {stages} stages but there is no timeline of stage "
            f"{missing[0]}; point to the folder that --bpipe-report wrote, all its files together"
        )
    return [_read(files[stage]) for stage in range(stages)]


def _read(path: Path) -> Timeline:
    data = load(path)
    check_version(str(path), data, VERSION)
    try:
        iterations = [
            [Event(**read(Event, f"{path}: {event.get('op')}", event)) for event in events]
            for events in data["iterations"]
        ]
        return Timeline(data["stage"], data["rank"], iterations)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: not what --bpipe-report writes ({error}); {AGAIN}") from error
