"""What a user sees who types something wrong, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bpipe import __version__
from megatron_bpipe.cli.main import main


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["simulate", "--ppp", "4"], "simulate: --ppp is not known; did you mean --pp?"),
        (["schedule", "--pp", "4", "--microbatch", "8"], "did you mean --microbatches?"),
        (["placement", "--gpu-per-node=4", "--pp", "4"], "did you mean --gpus-per-node?"),
        (["doctor", "--jsno"], "doctor: --jsno is not known; did you mean --json?"),
        (["plan", "--modle", "x"], "did you mean --model?"),
        (["compare", "a", "b", "--htm", "x"], "did you mean --html?"),
        (["tables", "--quite-unlike"], "tables: --quite-unlike is not known (see"),
    ],
)
def test_a_mistyped_flag_is_named_with_the_nearest_one(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert named in said
    assert f"(see python -m megatron_bpipe {words[0]} --help)" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["simulate", "schedule", "plan", "placement", "compare", "run"])
def test_a_bare_command_shows_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    assert f"usage: python -m megatron_bpipe {command}" in capsys.readouterr().out


def test_nothing_at_all_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert "compare" in said
    assert "simulate" in said


@pytest.mark.parametrize("words", [[], ["run"], ["plan"], ["doctor"], ["schedule"]])
def test_version(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main([*words, "--version"]) == 0
    assert capsys.readouterr().out == f"megatron_bpipe {__version__}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["simulate", "--microbatches", "8"], "--pp is missing"),
        (["simulate", "--pp", "4"], "--microbatches is missing"),
        (["simulate", "--from-report", "nowhere"], "nowhere/memory.json: No such file"),
        (["simulate", "--pp", "4", "--microbatches", "8", "--html", "x.txt"], "must end in .html"),
        (["simulate", "--pp", "4", "--microbatches", "8", "--trace", "x.txt"], "must end in .json"),
        (["simulate", "--pp", "4", "--microbatches", "8", "--png", "no/x.png"], "no folder no"),
        (["simulate", "--from-report", "x", "--pp", "4"], "--pp 4: the recorded run says it"),
        (["simulate", "--from-report", "x", "--budget", "4"], "--budget 4.0: the recorded run"),
        (["schedule", "--pp", "4", "--microbatches", "8", "--lowered"], "add --csv"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert named in said.err
    assert "None" not in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""  # nothing is drawn before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run", "nofile.py", "--bpipe"], "no training script at 'nofile.py'"),
        (
            ["profile", "--output", "p.json", "--", "--num-layers", "4"],
            "lack --hidden-size, --num-attention-heads, --seq-length",
        ),
    ],
)
def test_what_cannot_work_fails_before_torch_is_imported(words: list[str], named: str) -> None:
    code = (
        "import sys; from megatron_bpipe.cli.main import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'megatron'} & set(sys.modules); sys.exit(status)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert named in done.stderr


def test_a_small_job_is_one_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["placement", "--pp", "4"]) == 0
    said = capsys.readouterr().out
    assert "Node 0" in said
    assert "Node 1" not in said


def test_files_are_named_when_they_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, trace = tmp_path / "a.html", tmp_path / "a.json"
    words = ["simulate", "--pp", "4", "--microbatches", "8"]
    assert main([*words, "--html", str(page), "--trace", str(trace)]) == 0
    assert capsys.readouterr().err == f"written: {page}\nwritten: {trace}\n"


def test_a_plan_where_nothing_fits_has_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--gpu", "A100-80GB", "--gpus", "1", "--gpus-per-node", "1", "--global-batch", "8"]
    assert main(["plan", "--model", "LLaMA 65B", *words]) == 1
    assert "Nothing fits" in capsys.readouterr().out
