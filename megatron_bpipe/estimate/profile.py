"""A profile: what one stage of a model costs on the hardware at hand, as a file.

``python -m megatron_bpipe profile`` writes it, the planner reads it. It holds what table 5 of the
re-evaluation holds, for one's own model and GPU: a stage of some layers, alone, once for each
micro-batch and attention method; and the output layer with its loss, once for each micro-batch.
Tensor parallelism is divided out: the layers are one rank's share, without the messages between
ranks.

Units: seconds, bytes, MFU in per cent of ``Device.peak_flops``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Attention

FORMAT = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one computation over ``repeats`` repeats: median and quartiles."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class StageRow:
    """A stage of ``Profile.layers`` layers at one micro-batch, in one way to compute attention.

    ``moved`` is what the layers keep from their forward to their backward; ``mfu`` counts forward
    and backward of these layers, recomputation not counted.  Where the stage could not run,
    ``failure`` says why ("out of memory: ...") and everything else is None.
    """

    micro_batch: int
    attention: Attention
    forward: Timing | None = None
    backward: Timing | None = None
    moved: int | None = None
    mfu: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class HeadRow:
    """Final norm, output layer and loss at one micro-batch; fields as in ``StageRow``."""

    micro_batch: int
    forward: Timing | None = None
    backward: Timing | None = None
    moved: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Device:
    """What it was measured on; ``peak_source`` says where ``peak_flops`` comes from."""

    name: str
    peak_flops: float
    peak_source: str
    memory_bytes: int


@dataclass(frozen=True)
class Profile:
    """One profile.

    ``sequence_parallel`` whether the layers ran with it; ``ep`` expert-parallel size divided out;
    ``element`` bytes of an activation; ``made_by`` command, date and versions.
    """

    model: Model
    tp: int
    sequence_parallel: bool
    ep: int
    element: int
    layers: int
    device: Device
    stage: tuple[StageRow, ...]
    head: tuple[HeadRow, ...]
    made_by: Mapping[str, str] = field(default_factory=dict)

    def stage_row(self, micro_batch: int, attention: Attention) -> StageRow | None:
        """The row of that micro-batch and attention, None where it was not measured."""
        wanted = (micro_batch, attention)
        return next((r for r in self.stage if (r.micro_batch, r.attention) == wanted), None)

    def head_row(self, micro_batch: int) -> HeadRow | None:
        """The output layer at that micro-batch, None where it was not measured."""
        return next((r for r in self.head if r.micro_batch == micro_batch), None)


def check_model(profile: Profile, model: Model) -> None:
    """Raise EstimateError naming the first field in which the profile is not of this model."""
    for name, value in vars(model).items():
        measured = getattr(profile.model, name)
        if name not in ("name", "layers") and measured != value:
            raise EstimateError(
                f"model.{name} is {measured!r}, the model has {value!r}: profile the model you "
                "plan for"
            )


def write_profile(profile: Profile, path: Path) -> None:
    """Write it as JSON; raises OSError."""
    data = {"format": FORMAT, **asdict(profile)}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_profile(path: Path) -> Profile:
    """Read it; raises EstimateError naming the file and the field that is missing or wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EstimateError(
            f"{path}: {error.strerror}; make it with python -m megatron_bpipe profile"
        ) from error
    except ValueError as error:
        raise EstimateError(f"{path} is no JSON ({error}): make it again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise EstimateError(f"{path}: format is {found!r}, not {FORMAT}: make the profile again")
    read = _Reader(path)
    return Profile(
        model=read.build(Model, data.get("model"), "model"),
        tp=read.number(data, "tp"),
        sequence_parallel=read.truth(data, "sequence_parallel"),
        ep=read.number(data, "ep"),
        element=read.number(data, "element"),
        layers=read.number(data, "layers"),
        device=read.build(Device, data.get("device"), "device"),
        stage=tuple(read.row(StageRow, row, f"stage[{i}]") for i, row in read.rows(data, "stage")),
        head=tuple(read.row(HeadRow, row, f"head[{i}]") for i, row in read.rows(data, "head")),
        made_by=data.get("made_by") or {},
    )


_POSITIVE = (
    *("median", "low", "high", "repeats", "peak_flops", "memory_bytes", "micro_batch"),
    *("moved", "mfu", "hidden", "heads", "kv_heads", "layers", "seq", "vocab", "ffn"),
)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class _Reader:
    """Turns parsed JSON into dataclasses, naming the field that is in the way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, what: str) -> EstimateError:
        return EstimateError(f"{self.path}: {where} {what}: make the profile again")

    def number(self, data: Mapping[str, Any], name: str) -> int:
        value = data.get(name)
        if not isinstance(value, int) or value < 1:
            raise self.fail(name, f"is {value!r}, not a positive number")
        return value

    def truth(self, data: Mapping[str, Any], name: str) -> bool:
        value = data.get(name)
        if not isinstance(value, bool):
            raise self.fail(name, f"is {value!r}, neither true nor false")
        return value

    def rows(self, data: Mapping[str, Any], name: str) -> enumerate[Any]:
        value = data.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "is not a list")
        return enumerate(value)

    def build[T](self, kind: type[T], data: Any, where: str) -> T:
        if not isinstance(data, dict):
            raise self.fail(where, "is missing")
        known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
        for name, value in data.items():
            if name not in known:
                raise self.fail(f"{where}.{name}", "is not known")
            if name in _POSITIVE and value is not None and not _positive(value):
                raise self.fail(f"{where}.{name}", f"is {value!r}, not a positive number")
        try:
            return kind(**data)
        except TypeError as error:
            raise self.fail(where, f"lacks a field ({error})") from error
        except EstimateError as error:
            raise EstimateError(f"{self.path}: {where}: {error}") from error

    def row[T](self, kind: type[T], data: Any, where: str) -> T:
        row = dict(data) if isinstance(data, dict) else data
        if isinstance(row, dict):
            for name in ("forward", "backward"):
                if row.get(name) is not None:
                    row[name] = self.build(Timing, row[name], f"{where}.{name}")
            attention = row.get("attention", "none")
            if attention not in get_args(Attention):
                raise self.fail(f"{where}.attention", f"is {attention!r}")
            measured = [row.get(n) is not None for n in ("forward", "backward", "moved")]
            if all(measured) == (row.get("failure") is not None) or any(measured) != all(measured):
                raise self.fail(where, "needs forward, backward and moved, or a failure")
        return self.build(kind, row, where)
