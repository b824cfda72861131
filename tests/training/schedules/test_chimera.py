"""Chimera in Megatron's loop: bitwise stock 1F1B with twice the data parallelism.

Stock runs the same global batch on twice the ranks.  A copy of part x of the model is compared with
stage x of stock, whichever way it goes.  Gradients are clipped, so their norm is right too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_bpipe.estimate.refusals import BOTH_WAYS
from megatron_bpipe.integration.checks.schedules.chimera import check_both_ways
from megatron_bpipe.integration.log import Abort
from megatron_bpipe.integration.options import Options
from tests.harness import Megatron, Result
from tests.harness.models import gpt
from tests.training.combinations import LLAMA, Combination

UNTIED = "--untie-embeddings-and-output-weights"
CHIMERA = ("--bpipe-schedule", "chimera")
ONE_SAMPLER = {"call": "tests.harness.settings:both_ways_are_fed_alike", "with": {}}
NORM_OF_ALL = {"call": "tests.harness.controls:every_copy_counts", "with": {}}
STEPS = 3
# clips every step
FLAGS = gpt(4, 8, None, UNTIED, "--eval-iters", "2", "--eval-interval", "2", "--clip-grad", "0.5")
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform"]

# stock's ranks, twice Chimera's
COMBINATIONS = {
    "tied embeddings": Combination(8, gpt(4, 8)),
    "one group of p micro-batches": Combination(8, gpt(4, 4, None, UNTIED)),
    "pp6": Combination(12, gpt(6, 12, None, UNTIED)),
    "dp2": Combination(16, gpt(4, 16, None, UNTIED)),
    "tp2 with sequence parallelism": Combination(
        16, gpt(4, 8, None, UNTIED, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    ),
    "bf16": Combination(8, gpt(4, 8, None, UNTIED, "--bf16")),
    "full recompute": Combination(8, gpt(4, 8, None, UNTIED, *FULL, "--recompute-num-layers", "1")),
    "selective recompute": Combination(
        8, gpt(4, 8, None, UNTIED, "--recompute-granularity", "selective")
    ),
    "LLaMA-like, bf16": Combination(8, gpt(4, 8, None, *LLAMA, "--bf16")),
    "per-token loss": Combination(8, gpt(4, 8, None, UNTIED, "--calculate-per-token-loss")),
    "gradients reduced beside backwards": Combination(
        8, gpt(4, 8, None, UNTIED, "--overlap-grad-reduce")
    ),
    "uneven layers": Combination(
        8, gpt(4, 8, 8, UNTIED, "--pipeline-model-parallel-layout", "Et|tt|tt|tttL")
    ),
    "samples at random": Combination(8, gpt(4, 8, None, UNTIED, "--dataloader-type", "cyclic")),
    "all timers": Combination(8, gpt(4, 8, None, UNTIED, "--timing-log-level", "2")),
}


def run(megatron: Megatron, flags: list[str], world: int, *hooks: dict[str, object]) -> Result:
    return megatron.train(flags, world=world, steps=STEPS, hooks=list(hooks))


def difference_between_copies(
    stock: Result, chimera: Result, stages: int = 4, tensor: int = 1
) -> str | None:
    """None if every copy of every part is bitwise stock's, else what differs.

    ``tensor`` is the tensor-parallel size.

    Raises:
        AssertionError: a run failed, or dumped nothing to compare.
    """
    assert stock.ok, stock.logs
    assert chimera.ok, chimera.logs
    inner = len(chimera.states) // stages  # ranks of a stage: tensor parallel within data parallel
    for rank, state in enumerate(chimera.states):
        stage, place = divmod(rank, inner)
        for what in ("params", "grads"):
            assert state[what]
            for name, found in state[what].items():
                way, _, inside = name.partition(".")
                part = stage if way == "0" else stages - 1 - stage
                wanted = stock.states[2 * inner * part + place % tensor][what][inside]
                if not torch.equal(found, wanted):
                    return f"{what} {name} of rank {rank}"
    return None


def reported(result: Result, pattern: str) -> list[str]:
    """What the last rank's log says, in order."""
    return re.findall(pattern, result.log(max(result.status)))


def test_bitwise_equal_with_clipping_and_evaluation(megatron: Megatron) -> None:
    """Parameters, gradients, and what the log and the report say."""
    stock, chimera = run(megatron, FLAGS, 8), run(megatron, [*FLAGS, *CHIMERA], 4)
    assert difference_between_copies(stock, chimera) is None
    assert stock.states[-1]["losses"] == chimera.states[-1]["losses"]
    for what in (r"lm loss: (\S+)", r"grad norm: (\S+)", r"learning rate: (\S+)"):
        assert len(reported(stock, what)) == STEPS
        assert reported(stock, what) == reported(chimera, what)
    assert min(float(norm) for norm in reported(stock, r"grad norm: (\S+)")) > 0.5  # it clipped
    validation = r"validation loss at iteration.*?lm loss value: (\S+)"
    assert len(reported(stock, validation)) >= 1
    assert reported(stock, validation) == reported(chimera, validation)
    peaks = [stage["peak_microbatches"] for stage in chimera.memory["stages"]]
    assert peaks == [3, 4, 4, 3]  # Li and Hoefler: p/2 + 1 on the outer stages, p on the inner


@pytest.mark.long
@pytest.mark.parametrize("name", COMBINATIONS)
def test_bitwise_equal_with(megatron: Megatron, name: str) -> None:
    case = COMBINATIONS[name]
    stock = run(megatron, case.flags, case.world)
    chimera = run(megatron, [*case.flags, *CHIMERA], case.world // 2)
    tensor = 2 if "--sequence-parallel" in case.flags else 1
    assert difference_between_copies(stock, chimera, int(case.flags[1]), tensor) is None
    ours, theirs = (result.states[-1]["losses"] for result in (chimera, stock))
    # more than two replicas are summed in another order, for the log alone
    tolerance = 1e-6 if name == "dp2" else 0.0
    for step, other in zip(ours, theirs, strict=True):
        assert torch.allclose(step["lm loss"], other["lm loss"], rtol=tolerance, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("wrong", [ONE_SAMPLER, NORM_OF_ALL])
def test_what_is_wrong_is_seen(megatron: Megatron, wrong: dict[str, object]) -> None:
    """Both directions with the same samples; a norm that counts every copy."""
    stock = run(megatron, FLAGS, 8)
    assert difference_between_copies(stock, run(megatron, [*FLAGS, *CHIMERA], 4, wrong))


@pytest.mark.long
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
@pytest.mark.parametrize("extra", [(UNTIED,), ("--bf16",)])
@pytest.mark.parametrize(
    ("first", "second"), [("chimera", "1f1b"), ("1f1b", "chimera"), ("chimera", "chimera")]
)
def test_resume_across_schedules(
    megatron: Megatron, tmp_path: Path, form: str, extra: tuple[str, ...], first: str, second: str
) -> None:
    """Three steps under one, three under the other: six of stock, bit for bit."""
    flags = gpt(4, 8, None, *extra)
    of = {"chimera": ([*flags, *CHIMERA], 4), "1f1b": (flags, 8)}
    whole = megatron.train(flags, world=8, steps=6)

    def train(schedule: str, *given: str) -> Result:
        flags, world = of[schedule]
        run = megatron.train([*flags, *given], world=world, steps=6, dump_at=3, fresh=True)
        assert run.ok, run.logs
        return run

    kept = ["--ckpt-format", form]
    save = ["--save", str(tmp_path), "--save-interval", "3", "--exit-interval", "3", *kept]
    train(first, *save)
    if form == "torch":
        files = sorted(path.name for path in (tmp_path / "iter_0000003").iterdir())
        assert files == [f"mp_rank_00_{stage:03d}" for stage in range(4)]
    resumed = train(second, "--load", str(tmp_path), *kept)
    assert resumed.states[-1]["losses"] == whole.states[-1]["losses"][3:]
    if second == "chimera":
        assert difference_between_copies(whole, resumed) is None
        return
    for one, other in zip(whole.states, resumed.states, strict=True):
        for what in ("params", "grads"):
            assert all(torch.equal(one[what][name], other[what][name]) for name in one[what])


GIVEN = SimpleNamespace(
    pipeline_model_parallel_size=4, global_batch_size=16, schedule="chimera", micro_batch_size=2
)
ASKED = Options(schedule="chimera")


def refused(capsys: pytest.CaptureFixture[str], count: int = 8, **given: object) -> str:
    args = SimpleNamespace(**(vars(GIVEN) | given))
    with pytest.raises(Abort):
        check_both_ways(args, ASKED, count)
    return capsys.readouterr().err


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_flags_are_refused_by_name(capsys: pytest.CaptureFixture[str], name: str) -> None:
    flag, why = BOTH_WAYS[name]
    said = refused(capsys, **{name: 1})
    assert f"cannot run with {flag} 1: {why}" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pipeline_model_parallel_size": 5}, "--pipeline-model-parallel-size is 5; use 6"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size is 2; use 4"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"tensor_parallel_num_weight_shards": 2}, "--tensor-parallel-num-weight-shards 2"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"save": "/x", "ckpt_format": "torch_dcp"}, "--ckpt-format torch_dcp"),
        ({"load": "/x", "non_persistent_ckpt_type": "local"}, "-ckpt-type local"),
        ({"dataloader_type": "external"}, "--dataloader-type external"),
        ({"count": 6}, "--global-batch-size 16 makes 6"),
        ({"eval_global_batch_size": 12}, "--eval-global-batch-size 12 makes 6"),
    ],
)
def test_sizes_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], given: dict[str, object], said: str
) -> None:
    assert said in refused(capsys, **given)


def test_balancing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Abort):
        check_both_ways(GIVEN, replace(ASKED, bpipe=True), 8)
    assert "--bpipe cannot balance --bpipe-schedule chimera" in capsys.readouterr().err
    check_both_ways(GIVEN, ASKED, 8)
