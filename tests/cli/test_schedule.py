"""``python -m megatron_bpipe schedule`` and the command line around it."""

import subprocess
import sys

import pytest

from megatron_bpipe.cli import run as run_command
from megatron_bpipe.cli.main import main
from megatron_bpipe.schedule import balance, draw, from_csv, lower, one_f_one_b, to_csv


def call(capsys, *words):
    status = main(words)
    output = capsys.readouterr()
    return status, output.out, output.err


def test_drawing(capsys):
    status, out, err = call(capsys, "schedule", "--pp", "4", "--microbatches", "8")
    assert (status, err) == (0, "")
    assert out == draw(balance(one_f_one_b(4, 8))) + "\n"
    assert out.isascii()
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("flags", "schedule"),
    [
        ([], balance(one_f_one_b(6, 12))),
        (["--stock"], one_f_one_b(6, 12)),
        (["--budget", "5"], balance(one_f_one_b(6, 12), 5)),
        (["--lowered"], lower(balance(one_f_one_b(6, 12)))),
        (["--stock", "--lowered"], lower(one_f_one_b(6, 12))),
    ],
    ids=str,
)
def test_csv(capsys, flags, schedule):
    status, out, err = call(capsys, "schedule", "--pp=6", "--microbatches=12", "--csv", *flags)
    assert (status, err) == (0, "")
    assert out == to_csv(schedule)
    assert from_csv(out, schedule.name, schedule.budget) == schedule


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--pp 0 --microbatches 8", ["--pp 0", "use --pp 1 or more"]),
        ("--pp -3 --microbatches 8", ["--pp -3", "use --pp 1 or more"]),
        ("--pp 4 --microbatches 0", ["--microbatches 0", "use --microbatches 1 or more"]),
        ("--pp 8 --microbatches 25 --budget 4", ["--budget 4", "use --budget 5 or more"]),
        ("--pp 8 --microbatches 25 --budget 0", ["--budget 0", "use --budget 5 or more"]),
        ("--pp 4 --microbatches 8 --stock --budget 3", ["--budget 3", "drop --stock"]),
        ("--pp four --microbatches 8", ["--pp", "four"]),
        ("--pp 4", ["--microbatches"]),
        ("--pp 4 --micro 8", ["--microbatches"]),
    ],
)
def test_one_clear_line_and_exit_2(capsys, flags, named):
    status, out, err = call(capsys, "schedule", *flags.split())
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    for words in named:
        assert words in err


def test_unknown_command(capsys):
    status, _, err = call(capsys, "shedule")
    assert status == 2
    assert "shedule" in err
    assert "schedule" in err
    assert err.count("\n") == 1


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage: python -m megatron_bpipe" in capsys.readouterr().out


def test_help(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert "schedule" in out
    status, out, _ = call(capsys, "schedule", "--help")
    assert status == 0
    assert "--microbatches" in out


def test_run_passes_everything_on(monkeypatch):
    got = []
    monkeypatch.setattr(run_command, "run", lambda args: got.append(args) or 0)
    flags = ["--bpipe", "--pp", "4", "-h", "--help", "--", "--lr=1e-4", "data", "--", "--csv"]
    assert main(["run", "pretrain_gpt.py", *flags]) == 0
    assert got[0].script == "pretrain_gpt.py"
    assert got[0].rest == flags


def module(*words, **rest):
    return subprocess.run(
        [sys.executable, "-m", "megatron_bpipe", *words],
        capture_output=True, text=True, timeout=120, check=False, **rest,
    )  # fmt: skip


def test_as_a_module():
    done = module("schedule", "--pp", "4", "--microbatches", "8")
    assert done.returncode == 0
    assert done.stdout == draw(balance(one_f_one_b(4, 8))) + "\n"
    assert module("schedule", "--pp", "0", "--microbatches", "8").returncode == 2


def test_the_schedule_command_needs_neither_torch_nor_megatron():
    code = (
        "import sys; from megatron_bpipe.cli.main import main; "
        "status = main(['schedule', '--pp', '4', '--microbatches', '8', '--csv']); "
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_seen_enough():
    words = f"{sys.executable} -m megatron_bpipe schedule --pp 16 --microbatches 900 --csv"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} | head -c 10"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "F0,F1,F2,F", "")


def test_interleaved_in_micro_batches_of_a_whole_stage(capsys):
    sizes = ["schedule", "--pp", "4", "--microbatches", "8", "--chunks", "2"]
    assert main(sizes) == 0
    drawn = capsys.readouterr().out
    assert "budget 4.5" in drawn
    assert "0: max 4.5" in drawn  # 11 chunks become 9
    assert "max 5" not in drawn
    assert main([*sizes, "--stock"]) == 0
    assert "0: max 5.5" in capsys.readouterr().out
    assert main([*sizes, "--budget", "4.4"]) == 2
    assert "use --budget 4.5 or more" in capsys.readouterr().err
    assert main([*sizes, "--group", "3"]) == 2
    assert "the group of micro-batches is 3: it must be from p = 4" in capsys.readouterr().err
    assert main([*sizes[:-2], "--group", "5"]) == 2
    assert "only interleaving has groups" in capsys.readouterr().err
