"""The file of a profile: what is written comes back, and what is wrong with a file is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import llama
from megatron_bpipe.estimate.profile import (
    Device,
    HeadRow,
    Profile,
    StageRow,
    Timing,
    read_profile,
    write_profile,
)

FAST, SLOW = Timing(0.01, 0.009, 0.012, 5), Timing(0.02, 0.019, 0.022, 5)
PROFILE = Profile(
    model=llama("small", hidden=256, heads=4, layers=8, seq=128, kv_heads=2),
    tp=2,
    sequence_parallel=True,
    ep=1,
    element=2,
    layers=4,
    device=Device("a device", 3.12e14, "datasheet", 80 * 2**30),
    stage=(
        StageRow(1, "none", FAST, SLOW, 3 * 2**20, 41.3),
        StageRow(2, "none", failure="out of memory: 5.0 MiB more did not fit"),
        StageRow(1, "flash", SLOW, FAST, 2**20, 43.5),
    ),
    head=(HeadRow(1, FAST, FAST, 2**19), HeadRow(2, failure="out of memory")),
    made_by={"torch": "2.13.0"},
)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(PROFILE, path)
    assert read_profile(path) == PROFILE


def test_rows_are_found_by_micro_batch_and_attention() -> None:
    assert PROFILE.stage_row(1, "flash") is PROFILE.stage[2]
    assert PROFILE.stage_row(2, "flash") is None
    assert PROFILE.head_row(2) is PROFILE.head[1]
    assert PROFILE.head_row(4) is None


def _drop(*names: str | int) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for name in names[:-1]:
            data = data[name]
        del data[names[-1]]

    return change


def _set(value: Any, *names: str | int) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for name in names[:-1]:
            data = data[name]
        data[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set(2, "format"), "format is 2, not 1"),
        (_drop("format"), "format is None"),
        (_drop("model"), "model is missing"),
        (_drop("model", "hidden"), "model lacks a field .*'hidden'"),
        (_set(1, "model", "colour"), "model.colour is not known"),
        (_set(3, "model", "heads"), "model: small: hidden 256 is not a multiple of 3 heads"),
        (_drop("device", "peak_flops"), "device lacks a field .*'peak_flops'"),
        (_set("fast", "stage", 0, "forward", "median"), "stage.0..forward.median is 'fast'"),
        (_set("x", "device", "peak_flops"), "device.peak_flops is 'x'"),
        (_set("yes", "sequence_parallel"), "sequence_parallel is 'yes'"),
        (_drop("ep"), "ep is None"),
        (_set(0, "tp"), "tp is 0, not a positive number"),
        (_set("2", "element"), "element is '2', not a positive number"),
        (_drop("layers"), "layers is None, not a positive number"),
        (_set({}, "stage"), "stage is not a list"),
        (_set([3], "head"), re.escape("head[0] is missing")),
        (_set("fast", "stage", 0, "attention"), re.escape("stage[0].attention is 'fast'")),
        (_drop("stage", 2, "forward", "median"), re.escape("stage[2].forward lacks a field")),
        (_set(None, "stage", 2, "moved"), re.escape("stage[2] needs forward, backward and moved")),
        (_set(None, "stage", 1, "failure"), re.escape("stage[1] needs")),
        (_set("both", "head", 0, "failure"), re.escape("head[0] needs")),
        (_set(1, "head", 0, "mfu"), re.escape("head[0].mfu is not known")),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Any], None], named: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(PROFILE, path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(EstimateError, match=named):
        read_profile(path)


def test_no_file_no_json_no_object(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(EstimateError, match=r"No such file.*megatron_bpipe profile"):
        read_profile(path)
    path.write_text("{")
    with pytest.raises(EstimateError, match=r"profile\.json is no JSON"):
        read_profile(path)
    path.write_text("[]")
    with pytest.raises(EstimateError, match="format is None, not 1"):
        read_profile(path)
