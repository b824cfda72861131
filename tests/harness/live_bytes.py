"""What lives: bytes of all tensors of a rank, each storage once; activations in micro-batches."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch

from tests.harness.rank import after_each_step


def watch(job: dict[str, Any], at: int) -> None:
    """Write them after training step ``at``: weights, gradients, optimizer, whatever is held."""

    def look(step: int, model: Any, result: Any) -> None:
        if step == at:
            Path(job["out"], f"live{os.environ['RANK']}").write_text(str(live_bytes()))

    after_each_step(look)


def live_bytes() -> int:
    """Of every tensor that Python can reach."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def microbatches_held(timeline: dict[str, Any]) -> float:
    """The most bytes of live activations of a stage, by what one micro-batch's forwards leave.

    Knows no schedule: both numbers are of storages alive after an op (``live_bytes``).
    """
    events = timeline["iterations"][-1]
    left: dict[str, int] = {}  # by chunk, of its first forward
    before = 0
    for event in events:
        if event["op"].startswith("F"):
            left.setdefault(event["op"].partition(".")[2], event["live_bytes"] - before)
        before = event["live_bytes"]
    return max(event["live_bytes"] for event in events) / sum(left.values())
