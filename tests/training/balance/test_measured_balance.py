"""Balance by measured peaks on runs made unbalanced on purpose: bitwise stock's, and emptier.

For each: the fullest stage as stock has it, by the paper's rule, by what was measured. Peaks are
what was seen: static bytes, the allocator's own peak above them (live activations among it), the
pool lent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_bpipe.cli.main import main
from megatron_bpipe.schedule.lowering.lower import lower
from megatron_bpipe.simulate import StageBytes, memory_steps, simulate
from megatron_bpipe.simulate.recorded.overlay import what_ran
from megatron_bpipe.simulate.recorded.recording import measured_costs, read_report
from tests.harness import Megatron, Result
from tests.harness.compare import difference, evicted
from tests.harness.models import TAMPER, gpt
from tests.training.combinations import MOE

STEPS = 4
MIB = 2**20
PAPER = ["--bpipe", "--bpipe-parts", "1"]
MEASURED = ["--bpipe", "--bpipe-balance", "measured"]
UNTIED = "--untie-embeddings-and-output-weights"
VOCABULARY = ["--make-vocab-size-divisible-by", "4096", UNTIED]  # 64 times the hidden size


NOTHING = "nothing is moved"  # the fullest stage has nothing that could leave, so none may lend


@dataclass(frozen=True)
class Case:
    """Flags, and some of the loans that must follow from what is measured."""

    flags: list[str]
    loans: str
    world: int = 4
    env: dict[str, str] = field(default_factory=dict)


CASES = {
    "vocabulary 64 times the hidden size": Case(
        gpt(4, 8, 8, *VOCABULARY),
        loans="stage 0 -> 2 (2)",
    ),
    "interleaving, vocabulary": Case(
        gpt(4, 8, 8, "--num-virtual-stages-per-pipeline-rank", "2", *VOCABULARY),
        loans="stage 3 -> 2 (1), stage 3 -> 1 (1)",
    ),
    "uneven layers by layout": Case(
        gpt(4, 8, 12, "--pipeline-model-parallel-layout", "Etttt|tt|t|tttttL"),
        loans="stage 0 -> 3 (1), stage 0 -> 2 (1)",
    ),
    "experts on the last stages": Case(
        gpt(4, 8, 12, *MOE, "--moe-layer-freq", "([0]*9+[1]*3)"),
        loans=NOTHING,
        # on a CPU oneDNN keeps a compiled kernel for every number of tokens that an expert has had,
        # in malloc's bytes; which numbers are to come nobody can foretell
        env={"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"},
    ),
}
QUICK = "interleaving, vocabulary"


def peaks(result: Result) -> list[float]:
    """Of each stage, in MiB."""
    return [
        (stage["static_bytes"] + stage["pool_bytes"] + stage["allocator_peak_bytes"]) / MIB
        for stage in result.memory["stages"]
    ]


def assert_simulated(result: Result) -> None:
    """The simulator, from the first iteration's sizes, against live storage and pools."""
    recording = read_report(result.out / "report")
    schedule = what_ran(recording)
    sizes = [
        StageBytes(tuple(stage.held_bytes), moved=tuple(stage.leaving_bytes))
        for stage in recording.run.stages
    ]
    simulated = memory_steps(simulate(lower(schedule), measured_costs(recording)), sizes)
    for memory, stage in zip(simulated, recording.run.stages, strict=True):
        assert memory.peak_activations == pytest.approx(stage.own_activation_bytes, rel=0.05)
        assert memory.pool == pytest.approx(stage.pool_bytes, rel=0.05)


def moves_at_the_end(result: Result) -> bool:
    """Whether anything left any stage in the last iteration."""
    ends = [result.timeline(x)["iterations"][-1] for x in range(len(result.memory["stages"]))]
    return any(event["op"].startswith("E") for events in ends for event in events)


def said(result: Result) -> str:
    """The one line before the second iteration."""
    lines = [line for line in result.log(0).splitlines() if "balance by measured peaks" in line]
    assert len(lines) == 1, result.log(0)
    return lines[0]


def cases() -> list[object]:
    return [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.long]) for name in CASES]


@pytest.mark.parametrize("name", cases())
def test_the_fullest_stage_is_emptier_and_training_the_same(
    megatron: Megatron, name: str, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    stock, paper, found = (
        megatron.train([*case.flags, *flags], world=case.world, steps=STEPS, env=case.env)
        for flags in ([], PAPER, MEASURED)
    )
    assert difference(stock, found) is None
    assert difference(stock, paper) is None
    assert evicted(found) > 0  # in the first iteration at least, by the paper's rule
    assert moves_at_the_end(found) is (case.loans != NOTHING)
    assert case.loans in said(found)
    fullest = [max(peaks(run)) for run in (stock, paper, found)]
    record_property("fullest stage, MiB: stock, paper's rule, measured rule", fullest)
    assert fullest[2] < (fullest[1] if case.loans == NOTHING else min(fullest[:2]))
    assert_simulated(found)
    foretold = [stage["foretold_peak_bytes"] / MIB for stage in found.memory["stages"]]
    assert max(foretold) == pytest.approx(max(peaks(found)), rel=0.05), fullest


def test_a_flipped_bit_shows(megatron: Megatron) -> None:
    flags = CASES[QUICK].flags
    stock = megatron.train(flags, steps=STEPS)
    tampered = megatron.train([*flags, *MEASURED], steps=STEPS, hooks=[TAMPER])
    assert difference(stock, tampered) is not None


def test_a_report_proposes_what_the_run_does(
    megatron: Megatron, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = CASES[QUICK].flags
    stock = megatron.train(flags, steps=STEPS)
    found = megatron.train([*flags, *MEASURED], steps=STEPS)
    assert main(["plan", "--from-report", str(stock.out / "report"), "--json"]) == 0
    proposed = json.loads(capsys.readouterr().out)["measured"]["loans"]
    done = re.findall(r"stage (\d+) -> (\d+) \((\d+)\)", said(found))
    assert {tuple(map(int, loan)) for loan in done} == {tuple(loan) for loan in proposed}


def test_a_limit_below_the_static_state_stops_every_rank(megatron: Megatron) -> None:
    flags = [*CASES[QUICK].flags, *MEASURED, "--bpipe-memory-limit", "1MiB"]
    result = megatron.train(flags, steps=STEPS)
    assert set(result.status.values()) == {2}
    assert "--bpipe-memory-limit 1.0MiB is below what stage 0 keeps between" in result.log(0)


@pytest.mark.long
def test_each_stage_recomputes_its_own_number_of_layers(megatron: Megatron) -> None:
    flags = CASES["vocabulary 64 times the hidden size"].flags
    stock = megatron.train(flags, steps=STEPS)
    paper = megatron.train([*flags, *PAPER], steps=STEPS)
    found = megatron.train([*flags, *PAPER, "--bpipe-recompute", "2,1,0,0"], steps=STEPS)
    assert difference(stock, found) is None
    held = [[stage["held_bytes"][0] for stage in run.memory["stages"]] for run in (paper, found)]
    assert held[1][0] < held[0][0] / 3  # both layers keep their input only
    assert held[1][1] < 0.7 * held[0][1]
    assert held[1][2:] == held[0][2:]


@pytest.mark.long
def test_a_limit_that_needs_the_host_and_one_that_cannot_be_kept(megatron: Megatron) -> None:
    flags = CASES[QUICK].flags
    stock = megatron.train(flags, steps=STEPS)
    limit = [*MEASURED, "--bpipe-memory-limit"]
    lowest = re.search(
        r"fullest stage \d with ([\d.]+) MiB; stock",
        said(megatron.train([*flags, *MEASURED], steps=STEPS)),
    )
    assert lowest is not None
    size = float(lowest[1])
    hosted = megatron.train([*flags, *limit, f"{size - 0.5:.1f}MiB"], steps=STEPS)
    assert difference(stock, hosted) is None
    assert "-> host" in said(hosted)
    assert_simulated(hosted)
    evictor = next(s["stage"] for s in hosted.memory["stages"] if s["evicted_bytes"])
    assert f"to recompute all layers of stage {evictor} instead" in hosted.log(evictor)
    assert max(peaks(hosted)) < 1.05 * (size - 0.5)
    fewer = megatron.train([*flags, *limit, f"{size + 1:.1f}MiB"], steps=STEPS)
    assert difference(stock, fewer) is None
    assert 0 < evicted(fewer) < evicted(hosted)
    none = megatron.train([*flags, *limit, f"{size / 1.5:.1f}MiB"], steps=STEPS)
    assert set(none.status.values()) == {2}
    assert re.search(r"cannot be kept: stage \d needs [\d.]+ MiB, [\d.]+ MiB more", none.log(0))


@pytest.mark.long
@pytest.mark.parametrize("transport", ["p2p", "host"])
def test_other_transports(megatron: Megatron, transport: str) -> None:
    flags = CASES[QUICK].flags
    stock = megatron.train(flags, steps=STEPS)
    found = megatron.train([*flags, *MEASURED, "--bpipe-transport", transport], steps=STEPS)
    assert difference(stock, found) is None
    assert evicted(found) > 0


def test_a_rank_whose_allocator_cannot_be_seen_stops_every_rank(
    megatron: Megatron, tmp_path: Path
) -> None:
    hook = {"call": "tests.harness.controls:hide_allocator", "with": {"rank": 2}}
    result = megatron.train([*CASES[QUICK].flags, *MEASURED], steps=STEPS, hooks=[hook])
    assert set(result.status.values()) == {2}
    assert "rank 2 cannot see them" in result.log(0)
