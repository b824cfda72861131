"""The pictures on docs/schedules/README.md are what the commands above them print."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE
from tests.harness import ROOT

PAGE = (ROOT / "docs" / "schedules" / "README.md").read_text(encoding="utf-8")
OTHER = (ROOT / "docs" / "schedules" / "flush-free.md").read_text(encoding="utf-8")
PICTURES = dict(
    re.findall(r"^```\n\$ python -m megatron_bpipe (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)
)


@pytest.mark.parametrize("command", PICTURES)
def test_a_picture_is_what_its_command_prints(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == PICTURES[command]


def test_every_schedule_is_there() -> None:
    shown = {word for command in PICTURES for word in command.split()}
    assert [name for name in CATALOGUE if name not in shown and f"`{name}`" not in OTHER] == []
