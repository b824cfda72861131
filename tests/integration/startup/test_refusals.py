"""What cannot work stops every rank before training, with one message that says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.harness import Megatron
from tests.harness.models import gpt

PP8 = ["--pipeline-model-parallel-size", "8", "--global-batch-size", "16", "--bpipe"]

MOE = ["--num-experts", "4", "--moe-shared-expert-intermediate-size", "32"]

# name -> (flags, what the message must name)
REFUSED = {
    "p = 1": (
        ["--bpipe"],
        ["--pipeline-model-parallel-size is 1", "set it to 4 or more"],
    ),
    "combined 1F1B": (
        [*PP8, "--overlap-moe-expert-parallel-comm"],
        ["--overlap-moe-expert-parallel-comm True", "combined 1F1B", "drop it"],
    ),
    "interleaving without chunks": (
        [*PP8, "--bpipe-schedule", "interleaved"],
        ["--bpipe-schedule interleaved does not fit a model of 1 chunk(s)"],
    ),
    "a budget below the least of chunks": (
        [*PP8, "--num-virtual-stages-per-pipeline-rank", "2", "--bpipe-budget", "8.4"],
        ["--bpipe-budget 8.4 is too small for 8 stages of 2 chunks: the least is 8.5"],
    ),
    "CUDA graphs": ([*PP8, "--cuda-graph-impl", "local"], ["--cuda-graph-impl local", "use none"]),
    "fine-grained offloading": (
        [*PP8, "--fine-grained-activation-offloading"],
        ["--fine-grained-activation-offloading", "use one of the two"],
    ),
    "CPU offloading": (
        [*PP8, "--cpu-offloading-num-layers", "1"],
        ["--cpu-offloading-num-layers 1", "use one of the two"],
    ),
    "shared experts on a stream of their own": (
        [*PP8, *MOE, "--moe-shared-expert-overlap"],
        ["--moe-shared-expert-overlap", "drop it"],
    ),
    "paged stash": ([*PP8, "--moe-paged-stash"], ["--moe-paged-stash", "use one of the two"]),
    "budget too small": (
        [*PP8, "--bpipe-budget", "4"],
        ["--bpipe-budget 4", "8 stages", "the least is 5"],
    ),
    "budget below one": ([*PP8, "--bpipe-budget", "0"], ["--bpipe-budget 0", "the least is 5"]),
    "no part at all": (
        [*PP8, "--bpipe-parts", "0"],
        ["--bpipe-parts 0", "at least 1 part", "use 1 to move it whole"],
    ),
    "budget below the least in parts": (
        [*PP8, "--bpipe-parts", "4", "--bpipe-budget", "4.5"],
        ["--bpipe-budget 4.5", "8 stages, in 4 parts", "the least is 4.75"],
    ),
    "parts of measured loans": (
        [*PP8, "--bpipe-parts", "4", "--bpipe-balance", "measured"],
        ["--bpipe-parts 4", "--bpipe-balance measured", "leave --bpipe-parts out"],
    ),
    "unknown transport": (
        [*PP8, "--bpipe-transport", "pigeon"],
        ["--bpipe-transport pigeon", "auto, ipc, shm, p2p, host"],
    ),
    "ipc without a GPU": (
        [*PP8, "--bpipe-transport", "ipc"],
        ["--bpipe-transport ipc", "it is for GPUs", "use shm"],
    ),
    "rehearsal without a GPU": (
        [*PP8, "--bpipe-rehearsal"],
        ["--bpipe-rehearsal", "there is none", "leave it out"],
    ),
    "no such data": (
        [*PP8, "--data-path", "0.3", "nowhere/text"],
        ["--data-path nowhere/text", "no nowhere/text.bin"],
    ),
    "hook point missing": (PP8, ["forward_step", "is not there", "doctor"]),
}

# name -> (flags, what is said); stock Megatron runs
STOCK = {
    "p = 2": (["--pipeline-model-parallel-size", "2", "--bpipe"], "nothing to balance: p = 2"),
    "p = 3": (["--pipeline-model-parallel-size", "3", "--bpipe"], "nothing to balance: p = 3"),
    "budget as large as 1F1B's": (
        [*PP8, "--bpipe-budget", "8"],
        "nothing to balance: --bpipe-budget is 8",
    ),
    "fewer micro-batches than the budget": (
        ["--pipeline-model-parallel-size", "8", "--global-batch-size", "4", "--bpipe"],
        "1F1B never holds more than 4",
    ),
}


@pytest.fixture(scope="module")
def answers(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("refusals") / "answers.json"
    cases = [
        {"flags": flags, "without": name == "hook point missing"}
        for name, (flags, _) in [*REFUSED.items(), *STOCK.items()]
    ]
    env = {"ANSWERS": str(path)}
    result = megatron.script("refusals.py", [json.dumps(cases)], world=1, env=env)
    assert result.ok, result.logs
    found = json.loads(Path(path).read_text())
    return dict(zip([*REFUSED, *STOCK], found, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_flag_value_and_remedy(answers: dict[str, dict], name: str) -> None:
    answer = answers[name]
    assert answer["code"] == 2, answer
    assert len(answer["error"].strip().splitlines()) == 1
    for words in REFUSED[name][1]:
        assert words in answer["error"]
    assert not answer["active"]


@pytest.mark.parametrize("name", STOCK)
def test_nothing_to_balance_runs_stock_and_says_so(answers: dict[str, dict], name: str) -> None:
    answer = answers[name]
    assert answer["code"] is None, answer
    assert STOCK[name][1] in answer["said"]
    assert not answer["active"]


def test_all_ranks_stop_with_one_message(megatron: Megatron) -> None:
    result = megatron.train([*gpt(4), "--bpipe", "--bpipe-budget", "2"])
    assert set(result.status.values()) == {2}
    logs = "".join(result.log(rank) for rank in range(4))
    assert logs.count("--bpipe-budget 2 is too small for 4 stages: the least is 3") == 1
    assert not re.search(r"iteration\s+1/", logs)
