"""What stops a job is the last thing that torchrun shows, after everything it says by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_bpipe.integration.log import Abort, abort

WHY = "--bpipe-budget 2 is too small for 4 stages: the least is 3"


def refuse(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch, everywhere: bool) -> Path:
    path = folder / f"error{rank}.json"
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("TORCHELASTIC_ERROR_FILE", path)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(Abort) as stopped:
        abort(WHY, on_every_rank=everywhere)
    assert stopped.value.code == 2
    return path


@pytest.mark.parametrize("everywhere", [False, True])
def test_torchrun_ends_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    everywhere: bool,
) -> None:
    files = [refuse(tmp_path, rank, monkeypatch, everywhere) for rank in range(4)]
    assert capsys.readouterr().err.count(WHY) == (4 if everywhere else 1)
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=2, error_file=str(file))
        for rank, file in enumerate(files)
    }
    shown = str(ChildFailedError("pretrain_gpt.py", failures)).strip().splitlines()
    assert WHY in shown[-2]
    assert set(shown[-1]) == {"="}


def test_without_torchrun_only_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Abort):
        abort(WHY)
    assert capsys.readouterr().err == f"bpipe: {WHY}\n"
