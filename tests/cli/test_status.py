"""The line that says what a slow command does now."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

CODE = """
import sys
from megatron_bpipe.cli.common.status import status_line
with status_line(quiet=sys.argv[1] == "quiet") as say:
    say("looking at one")
    say("looking at two")
"""


def on_a_terminal(*words: str) -> bytes:
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", CODE, *words], stderr=follower) as process:
        process.wait(timeout=60)
    os.close(follower)
    said = b""
    try:
        while part := os.read(leader, 4096):
            said += part
    except OSError:  # Linux says so at the end of a pseudo terminal
        pass
    os.close(leader)
    return said


def test_each_text_takes_the_place_of_the_one_before() -> None:
    lines = on_a_terminal("").split(b"\r\x1b[K")
    assert lines == [b"", b"looking at one", b"looking at two", b""]  # nothing stays


def test_quiet() -> None:
    assert on_a_terminal("quiet") == b""


@pytest.mark.parametrize("word", ["", "quiet"])
def test_a_file_gets_nothing(word: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, word], capture_output=True, check=True)
    assert done.stderr == b""
