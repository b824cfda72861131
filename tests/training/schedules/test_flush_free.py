"""Training without a flush is bitwise stock 1F1B whose weights were delayed by hand.

The reference (`tests/harness/delayed.py`) knows no versions and no calls. Every case has a control
without the delay, which must differ: a run that did not lag would prove nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpipe.schedule.ops import Kind
from megatron_bpipe.simulate.recorded.overlay import overlay
from megatron_bpipe.simulate.recorded.recording import read_report
from tests.harness import Megatron, Result
from tests.harness.compare import difference, evicted
from tests.harness.models import gpt, without
from tests.training.combinations import FUSION, LLAMA

ONCE = ["--rerun-mode", "disabled"]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
UNTIED = ["--untie-embeddings-and-output-weights"]
SGD = ["--optimizer", "sgd"]
TORCH = ["--ckpt-format", "torch"]  # checkpoints that are written fast
EVALUATION = ["--eval-iters", "2", "--eval-interval", "3"]


GROWS = ["--step-batch-size-schedule", "0:6 768:10 2560:16"]


def delay(lags: list[int], flushes: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "call": "tests.harness.delayed:delay_weights",
        "with": {"lags": lags, "flushes": list(flushes)},
    }


@dataclass(frozen=True)
class Case:
    """Flags, the lag of each stage, after which iterations the pipeline is flushed."""

    schedule: str
    flags: list[str]
    lags: list[int]
    flushes: tuple[int, ...] = ()
    world: int = 4
    hooks: list[dict[str, Any]] = field(default_factory=list)
    quick: bool = False


def two(*extra: str, m: int = 8, **more: Any) -> Case:
    """PipeDream-2BW on four stages."""
    return Case("pipedream-2bw", gpt(4, m, None, *ONCE, *extra), [1] * 4, **more)


STEPS = 10  # some that see weights which are neither the first nor the newest


CASES = {
    "2bw, untied, SGD": two(*UNTIED, *SGD, m=5),
    "2bw, tied, dropout": two(*DROPOUT, quick=True),
    "2bw, m = p - 1": two(m=3),
    "2bw, no clipping": two("--clip-grad", "0"),
    "2bw, bf16, all timers": two("--bf16", "--timing-log-level", "2"),
    "2bw, weight decay and a learning rate that changes": two(
        *("--lr-warmup-iters", "4", "--lr-decay-style", "cosine", "--min-lr", "1e-5"),
        *("--weight-decay", "0.1", "--lr-decay-iters", "9"),
    ),
    "2bw, gradient-accumulation fusion": two(hooks=[FUSION]),
    "2bw, selective recompute with dropout": two("--recompute-granularity", "selective", *DROPOUT),
    "2bw, full recompute with dropout": two(
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", "1", *DROPOUT),
    ),
    "2bw, evaluation between steps": two(*EVALUATION, *DROPOUT, flushes=(3, 6, 9)),
    "2bw, per-token loss": two("--calculate-per-token-loss"),
    # 6, 6, 10, 10, 10 and then 16 sequences of 64 tokens
    "2bw, a batch size that grows": Case(
        "pipedream-2bw",
        [*without(gpt(4, 8, None, *ONCE), "--global-batch-size"), *GROWS],
        [1] * 4,
        (2, 5),
    ),
    "2bw, tp2 with sequence parallelism": two(
        *("--tensor-model-parallel-size", "2", "--sequence-parallel", *DROPOUT), world=8
    ),
    "2bw, dp2, overlapped reduction": two("--overlap-grad-reduce", m=16, world=8),
    "2bw, LLaMA-like, tp2, sequence parallelism, bf16": two(
        *(*LLAMA, "--bf16", "--tensor-model-parallel-size", "2", "--sequence-parallel"), world=8
    ),
    "2bw, pp8": Case("pipedream-2bw", gpt(8, 9, None, *ONCE), [1] * 8, world=8),
    "2bw, odd p": Case("pipedream-2bw", gpt(5, 7, None, *ONCE), [1] * 5, world=5),
    "pipedream, dropout": Case(
        "pipedream", gpt(4, 1, None, *ONCE, *DROPOUT), [3, 2, 1, 0], quick=True
    ),
    "pipedream, evaluation between steps": Case(
        "pipedream", gpt(4, 1, None, *ONCE, *EVALUATION, *DROPOUT), [3, 2, 1, 0], (3, 6, 9)
    ),
    "pipedream, bf16, untied": Case(
        "pipedream", gpt(4, 1, None, *ONCE, *UNTIED, "--bf16"), [3, 2, 1, 0]
    ),
    "continuous, m = 3, dropout": Case(
        "continuous", gpt(4, 3, None, *ONCE, *DROPOUT), [3, 2, 1, 0]
    ),
    "continuous, evaluation between steps": Case(
        "continuous", gpt(4, 2, None, *ONCE, *EVALUATION), [3, 2, 1, 0], (3, 6, 9)
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if c.quick else pytest.mark.long) for n, c in CASES.items()]
)
def test_bitwise_equal_to_delayed_weights(megatron: Megatron, name: str) -> None:
    case = CASES[name]
    same: dict[str, Any] = {"world": case.world, "steps": STEPS}
    flags = [*case.flags, "--bpipe-schedule", case.schedule]
    ours = megatron.train(flags, hooks=case.hooks, **same)
    hooks = [*case.hooks, delay(case.lags, case.flushes)]
    reference = megatron.train(case.flags, hooks=hooks, **same)
    control = megatron.train(case.flags, hooks=case.hooks, **same)
    assert difference(ours, reference) is None
    assert difference(ours, control) is not None


def test_a_report_shows_iterations_one_after_the_other(megatron: Megatron) -> None:
    """What a stage is ahead in one iteration lies beside the next one's of another stage."""
    case = CASES["2bw, tied, dropout"]
    flags = [*case.flags, "--bpipe-schedule", case.schedule]
    result = megatron.train(flags, world=case.world, steps=STEPS, hooks=case.hooks)
    recording = read_report(result.out / "report")
    for events in recording.stages:
        backwards = [seen.op.microbatch for seen in events if seen.op.kind is Kind.BACKWARD]
        assert len(backwards) == 8 * 8  # of the last 8 iterations
        assert backwards == sorted(backwards)
    assert dict(overlay(recording, "2bw").facts)["bubble"].endswith("%")


def run_ahead(
    megatron: Megatron, *extra: str, schedule: str = "pipedream-2bw", **more: Any
) -> Result:
    """With dropout in attention only: on the CPU the default generator, which other dropout draws
    from, is also the data loader's, and stock runs do not resume bitwise."""
    m = 1 if schedule == "pipedream" else 4
    flags = [*gpt(4, m, None, *ONCE, "--attention-dropout", "0.1"), *extra]
    return megatron.train([*flags, "--bpipe-schedule", schedule], **more)


def assert_continues(whole: Result, resumed: Result) -> None:
    assert whole.ok, whole.logs
    assert resumed.ok, resumed.logs
    for one, another in zip(whole.states, resumed.states, strict=True):
        for what in ("params", "grads"):
            assert one[what].keys() == another[what].keys()
            assert all(map(torch.equal, one[what].values(), another[what].values()))
    losses = [step["lm loss"] for step in whole.states[-1]["losses"]]
    after = [step["lm loss"] for step in resumed.states[-1]["losses"]]
    assert all(map(torch.equal, losses[-len(after) :], after))


@pytest.mark.parametrize("balanced", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_resumed_run_equals_one_that_goes_on(
    megatron: Megatron, tmp_path: Path, balanced: bool
) -> None:
    """The first step after the checkpoint has no lag, the second one has."""
    flags = ["--bpipe"] if balanced else []
    save = ["--save", str(tmp_path), "--save-interval", "2", *TORCH]
    whole = run_ahead(megatron, *flags, *save, steps=4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")  # as if it had ended there
    resumed = run_ahead(megatron, *flags, "--load", str(tmp_path), *TORCH, steps=4, dump_at=2)
    assert_continues(whole, resumed)
    assert not balanced or evicted(resumed) > 0


EXITS: dict[str, tuple[list[str], list[dict[str, Any]], str]] = {
    "an interval": (["--exit-interval", "4"], [], "exiting program at iteration 4"),
    "a signal": (
        ["--exit-signal-handler"],
        [{"call": "tests.harness.delayed:signal_after", "with": {"step": 4}}],
        "exiting program after receiving SIGTERM",
    ),
    "so many minutes": (
        ["--exit-duration-in-mins", "60"],
        [{"call": "tests.harness.delayed:started_earlier", "with": {"after": 4, "minutes": 61}}],
        "exiting program after 6",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["pipedream-2bw", "pipedream"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("why", EXITS)
def test_a_run_that_exits_resumes(
    megatron: Megatron, tmp_path: Path, why: str, schedule: str, balanced: bool
) -> None:
    """What ended it was not known beforehand, but for the interval; it is as if it had been."""
    flags, hooks, said = EXITS[why]
    choice = ["--bpipe"] if balanced else []
    kind = {"schedule": schedule}
    flush = {"call": "tests.harness.delayed:flush_unexpectedly", "with": {"after": 4}}
    whole = run_ahead(megatron, *choice, **kind, hooks=[flush], steps=8)
    save = ["--save", str(tmp_path), "--save-interval", "1000", *TORCH]
    begun = run_ahead(megatron, *choice, *save, *flags, **kind, hooks=hooks, steps=8, dump_at=4)
    assert begun.ok, begun.logs
    assert said in begun.log(0)
    load = ["--load", str(tmp_path), *TORCH]
    resumed = run_ahead(megatron, *choice, *load, **kind, steps=8, dump_at=4)
    assert_continues(whole, resumed)


@pytest.mark.parametrize("schedule", [*[pytest.param("pipedream", marks=pytest.mark.long)], "2bw"])
def test_what_ran_ahead_of_an_unexpected_flush_has_never_run(
    megatron: Megatron, schedule: str
) -> None:
    """Random state and data are as if the flush had been known: dropout draws the same numbers."""
    name, m, lags = ("pipedream", 1, [3, 2, 1, 0]) if schedule == "pipedream" else (
        "pipedream-2bw", 4, [1] * 4,
    )  # fmt: skip
    flags = [*gpt(4, m, None, *ONCE), *DROPOUT]
    flush = {"call": "tests.harness.delayed:flush_unexpectedly", "with": {"after": 3}}
    ours = megatron.train([*flags, "--bpipe-schedule", name], hooks=[flush], steps=7)
    reference = megatron.train(flags, hooks=[delay(lags, (3,))], steps=7)
    assert difference(ours, reference) is None


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "m", "versions"),
    [
        (None, 4, [1, 1, 1, 1]),
        ("pipedream-2bw", 4, [2, 2, 2, 2]),
        ("pipedream", 1, [4, 3, 2, 1]),
        ("continuous", 2, [4, 3, 2, 1]),
    ],
)
def test_buffers_of_weights_on_live_storage(
    megatron: Megatron, schedule: str | None, m: int, versions: list[int]
) -> None:
    """Both weights of an MLP have 64 KiB and nothing else has: counted are all storages alive."""
    flags = [*gpt(4, m, None, *ONCE, *UNTIED), "--optimizer", "sgd", "--sgd-momentum", "0"]
    flags += [] if schedule is None else ["--bpipe-schedule", schedule]
    count = {"call": "tests.harness.delayed:count_weight_buffers", "with": {"size": 65536}}
    result = megatron.train(flags, hooks=[count], steps=8)
    assert result.ok, result.logs
    for stage, kept in enumerate(versions):
        seen = json.loads((result.out / f"buffers{stage}.json").read_text())
        assert max(seen) == 2 * kept, (stage, seen)


@pytest.mark.parametrize("clip", ["0", pytest.param("1.0", marks=pytest.mark.long)])
def test_no_gathering_flushes_in_disguise(megatron: Megatron, clip: str) -> None:
    """Without clipping and shared embeddings no collective holds the stages together; with
    clipping one does, and so it does in the reference."""
    flags = [*gpt(4, 4, None, *ONCE, *UNTIED), "--clip-grad", clip, "--log-interval", "100"]
    count = {"call": "tests.harness.delayed:count_gatherings", "with": {}}
    ours = megatron.train(
        [*flags, "--bpipe-schedule", "pipedream-2bw"], hooks=[count], steps=6, report=False
    )
    assert ours.ok, ours.logs
    for stage in range(4):
        steps = json.loads((ours.out / f"gatherings{stage}.json").read_text())
        steady = steps[2:]  # the first begins with barriers and what is said of the schedule
        assert [bool(one) for one in steady] == [clip != "0"] * 4, (stage, steps)
    reference = megatron.train(flags, hooks=[delay([1] * 4)], steps=6, report=False)
    assert difference(ours, reference) is None


REFUSALS = {
    "distributed optimizer": (["--use-distributed-optimizer"], "writes new weights where older"),
    "fp8": (["--fp8-format", "hybrid"], "quantised weights are cached"),
    "fp16": (["--fp16"], "a skipped update is no version"),
    "experts": (["--num-experts", "4"], "would be of two on stages that are ahead"),
    "another optimizer": (["--optimizer", "muon"], "change each parameter in place"),
    "iterations to skip": (["--iterations-to-skip", "3"], "is read ahead of it"),
    "rerun": (["--rerun-mode", "validate_results"], "use --rerun-mode disabled"),
    "m < p - 1": (["--global-batch-size", "2"], "two weight versions need p-1 = 3 or more"),
    "interleaving": (["--num-virtual-stages-per-pipeline-rank", "2"], "does not fit a model of 2"),
    "parts": (["--bpipe", "--bpipe-parts", "2"], "travels whole"),
    "a small budget": (["--bpipe", "--bpipe-budget", "2"], "the least is 3"),
}


def test_refusals(megatron: Megatron, tmp_path: Path) -> None:
    base = ["--pipeline-model-parallel-size", "4", "--global-batch-size", "16"]
    base += [*ONCE, "--bpipe-schedule", "pipedream-2bw"]
    cases = [{"flags": [*base, *flags]} for flags, _ in REFUSALS.values()]
    one = ["--bpipe-schedule", "pipedream"]
    cases.append({"flags": [*base, *one]})
    path = tmp_path / "answers.json"
    environment = {"ANSWERS": str(path)}
    result = megatron.script("refusals.py", [json.dumps(cases)], world=1, env=environment)
    assert result.ok, result.logs
    answers = json.loads(path.read_text())
    wanted = [*(why for _, why in REFUSALS.values()), "after each micro-batch, so an iteration"]
    for answer, why in zip(answers, wanted, strict=True):
        assert answer["code"] == 2, answer
        assert "--bpipe-schedule" in answer["error"]
        assert why in answer["error"], answer
