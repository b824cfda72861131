"""``--help`` comes at once: it imports what a command takes, not what it does."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from megatron_bpipe.cli.main import main
status = main([sys.argv[1], "--help"])
heavy = {"torch", "numpy", "megatron", "matplotlib"} & set(sys.modules)
assert not heavy and f"megatron_bpipe.cli.{sys.argv[1]}" not in sys.modules, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    "command",
    ["compare", "doctor", "placement", "plan", "profile", "run", "schedule", "simulate", "tables"],
)
def test_help_takes_less_than_three_tenths_of_a_second(command):
    process = subprocess.Popen([sys.executable, "-c", CODE, command], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        text = out.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert f"usage: python -m megatron_bpipe {command}".encode() in text
    assert used.ru_utime + used.ru_stime < 0.3, (
        "CPU seconds, so that a busy machine may take longer"
    )
