"""The MFU line and the bpipe/* scalars arrive in Megatron's own TensorBoard log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Megatron
from tests.harness.models import gpt

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def test_scalars_are_written_where_megatron_writes_its_own(
    megatron: Megatron, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*gpt(4), "--bpipe", "--tensorboard-dir", str(tmp_path)]
    result = megatron.train(flags, steps=4)
    assert result.ok, result.logs
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"bpipe/tflops_per_gpu", "bpipe/budget", "bpipe/pool_mib"} <= tags
    assert "bpipe/mfu_percent" not in tags  # a CPU has no known peak
    speed = events.Scalars("bpipe/tflops_per_gpu")
    assert [event.step for event in speed] == [2, 3, 4]
    # equation 1 of one step, over the time the log says it took
    b, s, h, layers, vocabulary = 16, 64, 64, 4, 384
    flops = 72 * b * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
    said = [line for line in result.log(3).splitlines() if "bpipe: iteration 4: MFU" in line]
    seconds = float(said[0].rsplit(",", 1)[1].split()[0])
    assert speed[-1].value == pytest.approx(flops / seconds / 4 / 1e12, rel=0.01)
    budgets = {event.value for event in events.Scalars("bpipe/budget")}
    assert budgets == {3.0}
