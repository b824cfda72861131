"""The bpipe/* scalars arrive in Megatron's own TensorBoard and W&B logs (W&B offline)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Megatron, Result
from tests.harness.models import gpt

pytest.importorskip("tensorboard", reason="tensorboard is not installed")
STAGES = 4


@pytest.fixture(scope="module")
def trained(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("scalars")
    flags = [*gpt(4), "--bpipe", "--tensorboard-dir", str(folder)]
    flags += ["--wandb-project", "bpipe", "--wandb-exp-name", "test"]
    flags += ["--wandb-save-dir", str(folder)]
    pytest.importorskip("wandb", reason="wandb is not installed")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    result = megatron.train(flags, steps=4, env=offline)
    assert result.ok, result.logs
    return result, folder


def test_scalars_are_written_where_megatron_writes_its_own(
    trained: tuple[Result, Path],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, folder = trained
    events = EventAccumulator(str(folder)).Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("bpipe/")
    }
    peaks = {f"bpipe/peak_mib/stage_{stage}" for stage in range(STAGES)}
    moved = {f"bpipe/{name}" for name in ("pool_mib", "evicted_gib", "spilled_bytes", "exposed_ms")}
    # no bpipe/mfu_percent: a CPU has no known peak
    assert found.keys() == {"bpipe/tflops_per_gpu", "bpipe/budget", *peaks, *moved}
    assert all([step for step, _ in values] == [2, 3, 4] for values in found.values())
    last = {name: values[-1][1] for name, values in found.items()}
    assert last["bpipe/budget"] == 3.0
    assert last["bpipe/spilled_bytes"] == 0
    assert last["bpipe/exposed_ms"] >= 0
    stages = result.memory["stages"]
    for stage in stages:
        shown = last[f"bpipe/peak_mib/stage_{stage['stage']}"] * 2**20
        assert shown == pytest.approx(stage["peak_activation_bytes"], rel=1e-6)
    evicted = sum(stage["evicted_bytes"] for stage in stages)
    assert last["bpipe/evicted_gib"] * 2**30 == pytest.approx(evicted, rel=1e-6)
    pool = max(stage["pool_bytes"] for stage in stages)
    assert last["bpipe/pool_mib"] * 2**20 == pytest.approx(pool, rel=1e-6)
    # matrix products of one step by hand: 4 layers of h = 64, s = 64, a vocabulary of 384
    b, s, h, layers, vocabulary = 16, 64, 64, 4, 384
    layer = 2 * (4 * h * h) + 2 * (8 * h * h) + 4 * s * h
    flops = 3 * b * s * (layers * layer + 2 * h * vocabulary)
    speeds = [value for _, value in found["bpipe/tflops_per_gpu"]]
    seconds = sum(flops / (speed * STAGES * 1e12) for speed in speeds)
    # from the log of step 1 to that of step 4: three iterations, and what lies between them
    iterations = result.memory["iterations"]
    assert iterations[3][1] - iterations[1][0] <= seconds * 1.01
    assert seconds < 2.5 * (iterations[3][1] - iterations[0][0])


def test_weights_and_biases_gets_the_same(trained: tuple[Result, Path]) -> None:
    from wandb.proto import wandb_internal_pb2

    _, folder = trained
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    keys: set[str] = set()
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            keys |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    wanted = {"bpipe/tflops_per_gpu", "bpipe/budget", "bpipe/evicted_gib", "bpipe/exposed_ms"}
    assert wanted <= keys
    assert {f"bpipe/peak_mib/stage_{stage}" for stage in range(STAGES)} <= keys


def records(log: bytes) -> Iterator[bytes]:
    """Records of a W&B transaction log: LevelDB's log format after a head of seven bytes."""
    block, at, parts = 32768, 7, b""
    while at + 7 <= len(log):
        if block - at % block < 7:  # a trailer too short for a header
            at += block - at % block
            continue
        size, kind = struct.unpack_from("<HB", log, at + 4)
        parts += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of several
            yield parts
            parts = b""
