"""What a pipeline message waits for, and that torch is left as it was."""

from __future__ import annotations

import ast
import importlib.util
import re
import threading
from pathlib import Path

import pytest
import torch

from megatron_bpipe.integration.patches import chunked_stage
from megatron_bpipe.integration.patches import stage as megatron_stage
from megatron_bpipe.integration.patches.p2p_sync import (
    MESSAGES,
    StreamWaits,
    host_waits,
    waits_for_this_stream_only,
)


class Communicator:
    """Ends its messages as Megatron's does."""

    pp_group = "the pipeline"

    def __init__(self) -> None:
        self.fails = False

    def recv_forward(self, shape: str, is_first: bool) -> str:
        torch.cuda.synchronize()
        if self.fails:
            raise ConnectionError("peer gone")
        return shape

    def reset(self) -> None:
        torch.cuda.synchronize()


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was waited for, in order."""
    seen: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            seen.append("stream")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: seen.append("device"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    return seen


def test_a_message_waits_for_the_stream_and_everything_else_for_the_device(
    waited: list[str],
) -> None:
    stock = torch.cuda.synchronize
    communicator = StreamWaits(Communicator())
    assert communicator.recv_forward("shape", is_first=False) == "shape"
    communicator.reset()
    assert waited == ["stream", "device"]
    assert torch.cuda.synchronize is stock
    assert communicator.pp_group == "the pipeline"


def test_a_host_that_need_not_wait_does_not(waited: list[str]) -> None:
    communicator = StreamWaits(Communicator(), host=False)
    assert communicator.recv_forward("shape", is_first=False) == "shape"
    assert waited == []
    communicator.reset()
    thread = threading.Thread(target=torch.cuda.synchronize)
    thread.start()
    thread.join()
    assert waited == ["device", "device"]


@pytest.mark.parametrize(
    ("backend", "clocked", "waits"),
    [("nccl", False, False), ("nccl", True, True), ("gloo", False, True)],
)
def test_who_has_to_wait(
    backend: str, clocked: bool, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: backend)
    assert host_waits("the pipeline", clocked=clocked) is waits


def test_torch_is_put_back_when_a_message_fails(waited: list[str]) -> None:
    stock = torch.cuda.synchronize
    failing = Communicator()
    failing.fails = True
    with pytest.raises(ConnectionError):
        StreamWaits(failing).recv_forward("shape", is_first=False)
    assert torch.cuda.synchronize is stock


def test_another_thread_still_waits_for_the_device(waited: list[str]) -> None:
    with waits_for_this_stream_only():
        thread = threading.Thread(target=torch.cuda.synchronize)
        thread.start()
        thread.join()
    assert waited == ["device"]


def test_all_messages_that_the_stage_sends_are_covered() -> None:
    # read, not imported: the test process must not load Megatron
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "pipeline_parallel" / "p2p_communication.py"
    tree = ast.parse(source.read_text())
    (cls,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "P2PCommunicator"]
    methods = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
    assert methods >= MESSAGES
    files = (megatron_stage.__file__, chunked_stage.__file__)
    stage = "".join(Path(file).read_text() for file in files)
    sent = set(re.findall(r"communicator\.((?:send|recv)_\w+)\(", stage))
    assert sent == MESSAGES
