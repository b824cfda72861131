"""Copies get hardware queues of their own where Megatron asks for one queue, before CUDA starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bpipe.integration.bootstrap.copy_queues import ask_for_copy_queues, ask_for_one_queue

COMPUTE, COPY = "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_MAX_COPY_CONNECTIONS"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({COMPUTE: "1"}, "8"),
        ({COMPUTE: "1", COPY: "2"}, "2"),  # the user's
        ({COMPUTE: "32"}, None),
        ({}, None),
    ],
)
def test_where_it_is_set(
    before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (COMPUTE, COPY):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    ask_for_copy_queues()
    found = os.environ.pop(COPY, None)
    assert found == after


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        (["--tensor-model-parallel-size", "4"], None, "1"),
        (["--context-parallel-size=2"], None, "1"),
        (["--tensor-model-parallel-size", "4"], "32", "32"),  # the user's
        (["--tensor-model-parallel-size", "1"], None, None),
        (["--tensor-model-parallel-size", "4", "--use-megatron-fsdp"], None, None),
        ([], None, None),
    ],
)
def test_the_one_queue_that_megatron_asks_for(
    flags: list[str], before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(COMPUTE, raising=False)
    if before is not None:
        monkeypatch.setenv(COMPUTE, before)
    said = ask_for_one_queue(flags)
    found = os.environ.pop(COMPUTE, None)
    assert found == after
    assert (said is not None) == (after is not None and before is None)


@pytest.mark.parametrize(("flags", "seen"), [(["--bpipe"], "8"), ([], "None")])
def test_run_sets_it_before_cuda_is_asked_for_anything(
    flags: list[str], seen: str, tmp_path: Path
) -> None:
    """Seen by the first question torch asks of CUDA; without --bpipe nothing is set."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch, os\n"
        "ask = torch.cuda.is_available\n"
        "def first():\n"
        f"    print('at the first question:', os.environ.get('{COPY}'), flush=True)\n"
        "    torch.cuda.is_available = ask\n"
        "    return ask()\n"
        "torch.cuda.is_available = first\n"
    )
    script = tmp_path / "script.py"
    script.write_text("")
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != COPY}
    environment |= {COMPUTE: "1", "PYTHONPATH": f"{tmp_path}:{root}"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bpipe", "run", str(script), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"at the first question: {seen}" in done.stdout
