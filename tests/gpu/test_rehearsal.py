"""Megatron's own training loop, four stages as processes on this GPU, in deterministic mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.torchrun import torchrun
from scripts.examples.prepare_data import write_dataset
from tests.gpu import NEEDS_GPU
from tests.harness import SCRIPT, Result
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt

pytestmark = NEEDS_GPU
STAGES, STEPS, SECONDS = 4, 4, 240
MODEL = [*gpt(STAGES, hidden=256), "--deterministic-mode", "--bf16"]
DETERMINISTIC = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
Train = Callable[..., Result]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains with the flags given; equal requests share one run."""
    folder = tmp_path_factory.mktemp("rehearsal")
    data = write_dataset(folder / "text", max_bytes=512 * 2**10)
    results: dict[str, Result] = {}

    def run(*extra: str, hooks: tuple[dict[str, Any], ...] = ()) -> Result:
        key = json.dumps([extra, hooks])
        if key not in results:
            out = folder / f"run{len(results)}"
            out.mkdir()
            argv = [*MODEL, *data.flags(), "--data-cache-path", str(folder / "cache")]
            argv += ["--train-iters", str(STEPS), "--bpipe-report", str(out / "report")]
            argv += ["--bpipe-rehearsal", *extra]
            job = {"script": str(SCRIPT), "argv": argv, "hooks": hooks}
            job |= {"dump_at": STEPS, "out": str(out)}
            (out / "job.json").write_text(json.dumps(job))
            results[key] = Result(out, dict.fromkeys(range(STAGES), _torchrun(out)))
        return results[key]

    return run


def _torchrun(out: Path) -> int | None:
    words = ["--log-dir", str(out / "torchrun"), "--redirects", "3"]
    words += ["-m", "tests.gpu.rank", str(out / "job.json")]
    code = torchrun(words, STAGES, SECONDS, out / "log", DETERMINISTIC)
    for rank in range(STAGES):
        parts = sorted((out / "torchrun").rglob(f"{rank}/std*.log"))
        text = "".join(part.read_text(errors="replace") for part in parts)
        (out / f"rank{rank}.log").write_text(text)
    return code


def test_bitwise_equal_over_ipc(train: Train) -> None:
    stock, bpipe = train(), train("--bpipe")
    assert difference(stock, bpipe) is None
    assert evicted(bpipe) > 0
    assert "transport ipc (chosen by auto: one GPU)" in bpipe.log(0)


def test_bitwise_equal_in_host_memory(train: Train) -> None:
    stock, bpipe = train(), train("--bpipe", "--bpipe-transport", "host")
    assert difference(stock, bpipe) is None
    assert bpipe.memory["stages"][0]["hosted_bytes"] > 0


def test_one_flipped_bit_is_seen(train: Train) -> None:
    assert difference(train(), train("--bpipe", hooks=(TAMPER,))) is not None


def test_the_allocator_s_own_peak_falls(train: Train) -> None:
    stock, bpipe = train().memory["stages"], train("--bpipe").memory["stages"]
    assert [stage["peak_microbatches"] for stage in stock] == [4, 3, 2, 1]
    assert all(stage["peak_microbatches"] <= 3 for stage in bpipe)
    ratio = bpipe[0]["allocator_peak_bytes"] / stock[0]["allocator_peak_bytes"]
    assert ratio < 0.85  # 3 of 4
    assert bpipe[3]["pool_bytes"] > 0


def test_what_is_saved_is_captured(train: Train) -> None:
    for stage in train("--bpipe").memory["stages"]:
        forward = stage["forward"]
        assert forward["not_captured_bytes"] <= 0.1 * forward["allocated_bytes"], forward
