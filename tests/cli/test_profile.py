"""``profile`` says what is wrong with its own options in one line, before it imports anything big;
and what it writes is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bpipe.cli.main import main
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
from megatron_bpipe.integration.profile import report
from megatron_bpipe.integration.profile.settings import (
    ProfileError,
    attention_from,
    micro_batches_from,
    size_from,
)

PROFILE = Profile(
    model=llama("small", hidden=256, heads=4, layers=8, seq=128),
    tp=2,
    sequence_parallel=True,
    ep=1,
    element=2,
    layers=4,
    device=Device("a device", 3.12e14, "datasheet", 80 * 2**30),
    stage=(
        StageRow(
            1,
            "flash",
            Timing(0.01, 0.009, 0.012, 5),
            Timing(0.02, 0.019, 0.022, 5),
            3 * 2**20,
            41.26,
        ),
        StageRow(2, "flash", failure="out of memory: 5.0 MiB more did not fit"),
        StageRow(4, "flash", failure="not tried: out of memory at 2"),
    ),
    head=(HeadRow(1, Timing(0.001, 0.001, 0.001, 1), Timing(0.002, 0.002, 0.002, 1), 2**19),),
    made_by={"dtype": "bfloat16"},
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--micro-batches", "1,two"], "--micro-batches '1,two': give positive numbers"),
        (["--micro-batches", "0"], "--micro-batches '0': give positive numbers"),
        (["--micro-batches", ","], "--micro-batches ',': give positive numbers"),
        (["--micro-batches", "²"], "--micro-batches '²': give positive numbers"),
        (["--attention", "none,flush"], "'flush' is not known: use none, recompute, flash, full"),
        (["--attention", ""], "--attention '': is empty: use none"),
        (["--layers", "0"], "--layers 0: give at least 1"),
        (["--repeats", "0"], "--repeats 0: give at least 1"),
        (["--warm-up", "-1"], "--warm-up -1: give at least 0"),
        (["--peak-tflops", "0"], "--peak-tflops 0: give the device's peak"),
        (["--peak-tflops", "inf"], "--peak-tflops inf: give the device's peak"),
        (["--memory-limit", "much"], "--memory-limit 'much': give a size, such as 512MiB"),
        (["--memory-limit", "0GiB"], "--memory-limit '0GiB': give a size"),
    ],
)
def test_wrong_options(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    assert main(["profile", "--output", str(path), *words, "--", "--num-layers", "4"]) == 2
    out, error = capsys.readouterr()
    assert said in error
    assert error.count("\n") == 1
    assert out == ""
    assert not path.exists()


@pytest.mark.parametrize("path", ["nowhere/profile.json", "."])
def test_no_place_for_the_file(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--output", path, "--", "--num-layers", "4"]) == 2
    assert f"--output {path}: give a file in a folder that exists" in capsys.readouterr().err


def test_the_file_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--", "--num-layers", "4"]) == 2
    assert "--output" in capsys.readouterr().err


def test_lists_are_sorted_sizes_and_ways_without_doubles() -> None:
    assert micro_batches_from("4, 1,4,2") == (1, 2, 4)
    assert attention_from("flash,none,flash") == ("flash", "none")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 1024**2), ("1.5 GiB", 1536 * 1024**2), ("2GB", 2 * 10**9), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_from(text) == size


def test_a_unit_nobody_knows() -> None:
    with pytest.raises(ProfileError, match="--memory-limit '2gib'"):
        size_from("2gib")


def test_the_table_has_every_row_and_why_it_failed() -> None:
    lines = report.table(PROFILE).splitlines()
    assert "4 of 8 layers, hidden 256, 4 heads, sequence 128, t = 2, bfloat16" in lines[0]
    assert "312 TFLOP/s (datasheet)" in lines[1]
    assert lines[4].split() == ["1", "flash", "10", "(9-12)", "20", "(19-22)", "3.00", "41.3"]
    assert lines[5].split(maxsplit=2) == ["2", "flash", "out of memory"]
    assert lines[6].split(maxsplit=2) == ["4", "flash", "not tried"]
    assert lines[7].split() == ["1", "output", "layer", "1", "(1-1)", "2", "(2-2)", "0.50"]
    assert lines[9:] == ["flash, micro-batch 2: out of memory: 5.0 MiB more did not fit"]


def test_saving_replaces_the_file_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    report.save(PROFILE, path)
    assert read_profile(path) == PROFILE
    longer = replace(PROFILE, made_by={"dtype": "float32"})

    def breaks_off(profile: Profile, path: Path) -> None:
        write_profile(profile, path)
        path.write_text(path.read_text()[:100])
        raise OSError("disk full")

    monkeypatch.setattr(report, "write_profile", breaks_off)
    with pytest.raises(OSError, match="disk full"):
        report.save(longer, path)
    assert read_profile(path) == PROFILE
    assert json.loads(path.read_text())["made_by"] == {"dtype": "bfloat16"}
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
