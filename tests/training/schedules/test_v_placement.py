"""V-Half, V-Min and V-ZB in Megatron's loop: bitwise its interleaving with the other placement.

Stock is Megatron's own interleaved schedule with two chunks a stage.  Both start from values that a
parameter's name in the whole model decides, and nothing draws random numbers.  Clipping is off: the
norm of all gradients is a sum over ranks, and which parameters a rank has is what differs.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bpipe.integration.log import Abort
from megatron_bpipe.integration.patches.v_placement.checkpoints import with_placement_checked
from tests.harness import Megatron, Result
from tests.harness.compare import difference, difference_across_placements, whole_model
from tests.harness.live_bytes import microbatches_held
from tests.harness.models import gpt
from tests.training.combinations import DISTRIBUTED_OPTIMIZER, LLAMA, MOE, Combination

BY_NAME = {"call": "tests.harness.settings:parameters_by_name", "with": {}}
TURN = {"call": "tests.harness.controls:wrong_at_the_turn", "with": {}}
APART = {"call": "tests.harness.controls:tied_gradients_stay_apart", "with": {}}
APEX = {"call": "tests.harness.fused_adam:instead_of_torch", "with": {}}
UNTIED = "--untie-embeddings-and-output-weights"
FULL = [
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
]
V = ("v-half", "v-min", "v-zb")


def chunked(stages: int, *extra: str, m: int = 8, layers: int = 1) -> list[str]:
    """``stages`` stages of two chunks."""
    virtual = ["--num-virtual-stages-per-pipeline-rank", "2", "--clip-grad", "0"]
    return gpt(stages, m, 2 * stages * layers, *virtual, *extra)


LAYOUT = ["--pipeline-model-parallel-layout", "Ett|tt|tt|tt|tt|tt|tt|ttL"]
UNTIED_4 = chunked(4, UNTIED)
COMBINATIONS = {
    "pp4 tied": Combination(4, chunked(4)),
    "pp2": Combination(2, chunked(2, UNTIED)),
    "pp3": Combination(3, chunked(3, UNTIED, m=9)),
    "pp8": Combination(8, chunked(8, UNTIED, m=16)),
    "tp2 with sequence parallelism": Combination(
        8, chunked(4, UNTIED, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    ),
    "dp2 distributed optimizer, both overlaps": Combination(
        8, chunked(4, UNTIED, *DISTRIBUTED_OPTIMIZER, m=16)
    ),
    "the same, tied": Combination(8, chunked(4, *DISTRIBUTED_OPTIMIZER, m=16)),
    "dp2, parameter gathers not aligned": Combination(
        8, chunked(4, UNTIED, *DISTRIBUTED_OPTIMIZER, "--no-align-grad-reduce", m=16)
    ),
    "bf16": Combination(4, chunked(4, UNTIED, "--bf16")),
    "bf16, tied": Combination(4, chunked(4, "--bf16")),
    "dp2, tied": Combination(8, chunked(4, "--overlap-grad-reduce", m=16)),
    "full recompute": Combination(4, chunked(4, UNTIED, *FULL)),
    "selective recompute": Combination(
        4, chunked(4, UNTIED, "--recompute-granularity", "selective")
    ),
    "MoE, 4 experts": Combination(4, chunked(4, UNTIED, *MOE)),
    "LLaMA-like": Combination(4, chunked(4, *LLAMA)),
    "messages not overlapped": Combination(4, chunked(4, UNTIED, "--no-overlap-p2p-communication")),
    "per-token loss": Combination(4, chunked(4, UNTIED, "--calculate-per-token-loss")),
    "two layers a chunk, by layout": Combination(
        4, gpt(4, 8, 16, *LAYOUT, "--clip-grad", "0", UNTIED)
    ),
}
LAYERS = {"two layers a chunk, by layout": 2}
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable", "--no-ckpt-fully-parallel-save"]
STEPS = 3


def run(megatron: Megatron, flags: list[str], world: int, schedule: str | None = None) -> Result:
    extra = [] if schedule is None else ["--bpipe-schedule", schedule]
    return megatron.train([*flags, *extra], world=world, steps=STEPS, hooks=[BY_NAME])


@pytest.mark.parametrize("schedule", V)
def test_bitwise_equal(megatron: Megatron, schedule: str) -> None:
    stock = run(megatron, UNTIED_4, 4)
    placed = run(megatron, UNTIED_4, 4, schedule)
    assert difference_across_placements(stock, placed, 4) is None


@pytest.mark.long
@pytest.mark.parametrize("schedule", V)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_bitwise_equal_with(megatron: Megatron, name: str, schedule: str) -> None:
    case = COMBINATIONS[name]
    stages = int(case.flags[1])
    stock = run(megatron, case.flags, case.world)
    placed = run(megatron, case.flags, case.world, schedule)
    layers = LAYERS.get(name, 1)
    assert difference_across_placements(stock, placed, stages, layers) is None


def test_one_wrong_bit_at_the_turn_is_seen(megatron: Megatron) -> None:
    stock = run(megatron, UNTIED_4, 4)
    flags = [*UNTIED_4, "--bpipe-schedule", "v-half"]
    wrong = megatron.train(flags, steps=STEPS, hooks=[BY_NAME, TURN])
    assert difference_across_placements(stock, wrong, 4) is not None


@pytest.mark.long
def test_tied_gradients_that_stay_apart_are_seen(megatron: Megatron) -> None:
    flags = chunked(4)
    stock = run(megatron, flags, 4)
    hooks = [BY_NAME, APART]
    apart = megatron.train([*flags, "--bpipe-schedule", "v-half"], steps=STEPS, hooks=hooks)
    assert difference_across_placements(stock, apart, 4) is not None


@pytest.mark.long
def test_tied_embeddings_have_one_weight_and_one_optimizer_state(megatron: Megatron) -> None:
    """Live storage of stage 0 beside two untied ends: weight, two moments and Adam's step fewer."""
    watch = {"call": "tests.harness.live_bytes:watch", "with": {"at": STEPS}}

    def live(*extra: str) -> Result:
        flags = [*chunked(4, *extra), "--bpipe-schedule", "v-half"]
        found = megatron.train(flags, steps=STEPS, hooks=[BY_NAME, watch])
        assert found.ok, found.logs
        return found

    tied, untied = live(), live(UNTIED)
    weights = untied.states[0]["params"].items()
    (size,) = [4 * each.numel() for name, each in weights if "word_embeddings" in name]
    seen = [int((run.out / "live0").read_text()) for run in (untied, tied)]
    assert seen[0] - seen[1] == 3 * size + 4
    both = [int((run.out / "live1").read_text()) for run in (untied, tied)]
    assert both[0] == both[1]


def test_losses_are_on_the_last_rank_and_stages_alike(megatron: Megatron) -> None:
    """The log's and the report's losses; live storage of every stage beside interleaving's 5.5."""
    stock = run(megatron, UNTIED_4, 4)
    placed = run(megatron, UNTIED_4, 4, "v-half")
    found = [re.findall(r"lm loss: (\S+)", result.log(3)) for result in (stock, placed)]
    assert found[0] == found[1]
    assert len(found[0]) == STEPS
    assert not placed.states[0]["losses"][0]
    assert stock.memory["losses"] == placed.memory["losses"]
    before = [stage["peak_microbatches"] for stage in stock.memory["stages"]]
    after = [stage["peak_microbatches"] for stage in placed.memory["stages"]]
    assert before == [5.5, 4.5, 3.5, 2.5]
    assert max(after) <= 3.5  # the paper's (p+2)/2, and half a one until the last W
    held = [stage["peak_activation_bytes"] for stage in placed.memory["stages"]]
    assert max(held) < 0.65 * stock.memory["stages"][0]["peak_activation_bytes"]
    assert max(held) < 1.2 * min(held)


@pytest.mark.parametrize(("schedule", "paper"), [("v-min", 2), ("v-half", 3), ("v-zb", 4)])
def test_live_storage_is_what_the_paper_states(
    megatron: Megatron, schedule: str, paper: int
) -> None:
    """(p+4)/3, (p+2)/2 and p micro-batches, in bytes of each stage (docs/schedules/README.md)."""
    placed = run(megatron, UNTIED_4, 4, schedule)
    held = [microbatches_held(placed.timeline(stage)) for stage in range(4)]
    assert max(held) == pytest.approx(paper, abs=0.35), held


def test_nothing_to_balance(megatron: Megatron) -> None:
    flags = [*UNTIED_4, "--bpipe-schedule", "v-half"]
    both = megatron.train([*flags, "--bpipe"], steps=STEPS, hooks=[BY_NAME])
    assert difference(run(megatron, UNTIED_4, 4, "v-half"), both) is None
    assert "nothing to balance: p = 4 and v-half never holds more than" in both.log(0)


@pytest.mark.long
@pytest.mark.parametrize("schedule", V)
def test_evaluation(megatron: Megatron, schedule: str) -> None:
    flags = chunked(4, UNTIED, "--eval-iters", "2", "--eval-interval", "2")
    stock, placed = run(megatron, flags, 4), run(megatron, flags, 4, schedule)
    assert difference_across_placements(stock, placed, 4) is None
    seen = r"validation loss at iteration.*?lm loss value: (\S+)"
    found = [re.findall(seen, result.log(3)) for result in (stock, placed)]
    assert found[0] == found[1]
    assert len(found[0]) >= 2


SCHEDULES = {"v-half": ["--bpipe-schedule", "v-half"], "v-zb": ["--bpipe-schedule", "v-zb"]}
WAYS = [("v-half", "interleaved"), ("interleaved", "v-half"), ("v-half", "1f1b"), ("1f1b", "v-zb")]


def flags_of(schedule: str, stages: int, *extra: str) -> list[str]:
    if schedule == "1f1b":
        return gpt(stages, 8, 2 * stages, "--clip-grad", "0", *extra)
    return chunked(stages, *extra) + SCHEDULES.get(schedule, [])


def saved(
    megatron: Megatron, folder: Path, flags: list[str], hooks: list[dict[str, Any]]
) -> Result:
    """Three steps of six, then a checkpoint."""
    save = ["--save", str(folder), "--save-interval", "3", "--exit-interval", "3"]
    flags = [*flags, *save, "--ckpt-format", "torch_dist"]
    return megatron.train(flags, steps=6, dump_at=3, hooks=hooks)


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), WAYS)
@pytest.mark.parametrize("extra", [(), (UNTIED,)])
def test_resume_across_placements(
    megatron: Megatron, tmp_path: Path, first: str, second: str, extra: tuple[str, ...]
) -> None:
    """Three steps under one, three under the other: six of stock, bit for bit."""
    resumes(megatron, tmp_path, (first, second), 4, extra, ("params", "grads"), [BY_NAME])


GATHERED = DISTRIBUTED_OPTIMIZER[:2]  # with its overlap a rank has its own shard until step 7


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [*WAYS, ("v-half", "v-half")])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_distributed_optimizer_goes_on_across_placements(
    megatron: Megatron, tmp_path: Path, first: str, second: str, parallel: bool
) -> None:
    """With a stand-in for Apex's Adam, without which stock cannot load its own state (below)."""
    extra = (*GATHERED, UNTIED, *RESHARDABLE[: 1 if parallel else 2])
    resumes(megatron, tmp_path, (first, second), 2, extra, ("params",), [BY_NAME, APEX])


@pytest.mark.long
def test_a_tied_distributed_optimizer_of_1f1b_goes_on_under_v(
    megatron: Megatron, tmp_path: Path
) -> None:
    extra = (*GATHERED, *RESHARDABLE)
    resumes(megatron, tmp_path, ("1f1b", "v-zb"), 2, extra, ("params",), [BY_NAME, APEX])


@pytest.mark.long
def test_what_megatron_would_save_shifted_is_not_saved(megatron: Megatron, tmp_path: Path) -> None:
    """Interleaving saves it: what goes on from there is not what went on.

    The tied embedding has a bucket of its own, behind one of 54,080 elements: 64 short of 2 x 128.
    """
    extra = (*GATHERED, *RESHARDABLE)
    with pytest.raises(AssertionError, match=r"where False = all\(<generator"):
        resumes(megatron, tmp_path, ("interleaved",) * 2, 2, extra, ("params",), [BY_NAME, APEX])
    refused = saved(megatron, tmp_path / "v", flags_of("v-half", 2, *extra), [BY_NAME, APEX])
    assert set(refused.status.values()) == {2}
    assert "what lies behind a bucket that is filled up, here by 64 elements" in refused.log(0)


def resumes(
    megatron: Megatron,
    folder: Path,
    ways: tuple[str, str],
    stages: int,
    extra: tuple[str, ...],
    compared: tuple[str, ...],
    hooks: list[dict[str, Any]],
) -> None:
    first, second = ways
    whole = megatron.train(chunked(stages, *extra), steps=6, hooks=hooks)
    begun = saved(megatron, folder, flags_of(first, stages, *extra), hooks)
    assert begun.ok, begun.logs
    load = ["--load", str(folder)]
    resumed = megatron.train(
        [*flags_of(second, stages, *extra), *load], steps=6, dump_at=3, hooks=hooks[1:]
    )
    assert resumed.ok, resumed.logs
    parts = {"interleaved": lambda x: stages + x}
    per_part = 2 if second == "1f1b" else 1
    for what in compared:
        one = whole_model(whole, what, stages, 1, lambda x: stages + x)
        other = whole_model(
            resumed, what, stages, per_part, parts.get(second, lambda x: 2 * stages - 1 - x)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["interleaved", "v-half"])
def test_stock_cannot_load_its_distributed_optimizer_here(
    megatron: Megatron, tmp_path: Path, schedule: str
) -> None:
    """Not what the placement does: interleaving fails alike. We say so when the run begins."""
    extra = (*DISTRIBUTED_OPTIMIZER, *RESHARDABLE)
    begun = saved(megatron, tmp_path, flags_of("interleaved", 2, *extra), [])
    assert begun.ok, begun.logs
    flags = [*flags_of(schedule, 2, *extra), "--load", str(tmp_path)]
    resumed = megatron.train(flags, steps=6)
    assert not resumed.ok
    assert "assert len(steps) == 1" in resumed.logs
    said = f"bpipe: --load {tmp_path}: Megatron, stock too, cannot load the state of"
    assert (said in resumed.log(0)) is (schedule == "v-half")


@pytest.mark.long
def test_a_checkpoint_by_rank_is_refused_under_the_other_placement(
    megatron: Megatron, tmp_path: Path
) -> None:
    save = ["--save", str(tmp_path), "--save-interval", "2", "--ckpt-format", "torch"]
    saved = megatron.train([*UNTIED_4, *save], steps=2, hooks=[BY_NAME])
    assert saved.ok, saved.logs
    load = ["--load", str(tmp_path), "--ckpt-format", "torch", "--bpipe-schedule", "v-half"]
    refused = megatron.train([*UNTIED_4, *load], steps=3)
    assert set(refused.status.values()) == {2}
    assert "--ckpt-format torch holds each rank's own layers" in refused.log(2)


DISTRIBUTED = {
    "ckpt_format": "torch_dist",
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": False,
}


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"ckpt_format": "torch"}, "--ckpt-format torch"),
        (DISTRIBUTED, "by bucket"),
        (DISTRIBUTED | {"dist_ckpt_optim_fully_reshardable": True}, None),
        ({"ckpt_format": "torch_dist"}, None),
        ({"ckpt_format": "torch", "bpipe_schedule": "v-min"}, None),
    ],
)
def test_checkpoints_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], saved: dict[str, object], refused: str | None
) -> None:
    check = with_placement_checked(lambda args: "checked by Megatron", "v-half")
    if refused is None:
        assert check(SimpleNamespace(**saved)) == "checked by Megatron"
        return
    with pytest.raises(Abort):
        check(SimpleNamespace(**saved))
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--mtp-num-layers", "1"], "cannot run with --mtp-num-layers 1"),
        (["--save", "/nowhere", "--ckpt-format", "torch"], "cannot save with --ckpt-format torch"),
    ],
)
def test_what_cannot_be_is_refused_by_name(megatron: Megatron, given: list[str], said: str) -> None:
    refused = megatron.train([*UNTIED_4, "--bpipe-schedule", "v-half", *given], steps=1)
    assert set(refused.status.values()) == {2}
    assert said in refused.log(0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "cannot save tied embeddings in parallel over data parallelism"),
        (DISTRIBUTED_OPTIMIZER, "cannot save --use-distributed-optimizer by bucket"),
    ],
)
def test_what_cannot_be_saved_at_data_parallel_size_2(
    megatron: Megatron, given: list[str], said: str
) -> None:
    flags = [*chunked(2), "--bpipe-schedule", "v-half", "--save", "/nowhere", *given]
    refused = megatron.train(flags, steps=1)
    assert set(refused.status.values()) == {2}
    assert said in refused.log(0)
