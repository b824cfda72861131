"""The planner against real runs: profile on this machine, predict, train, compare.

Memory must come out in the measured order. The order in time depends on what else the cores do:
benchmarks/planner.py states it (docs/results/planner.json).
"""

from __future__ import annotations

import itertools

import pytest

from megatron_bpipe.planner.evaluate import Predictor
from megatron_bpipe.planner.measured import MeasuredRun, proposals, read_report
from tests.harness import Megatron
from tests.harness.models import gpt
from tests.harness.planner_cases import CASES, SMALL, Case, outcome, profiled

TIE = 0.02
EXTRA = 0.2 * 2**20  # masks; the stage input that Megatron's last stage holds a forward longer


QUICK = (1, 4, 7, 9, 11)  # of CASES: 1F1B, full recomputation, p = 4, BPipe, uneven layers


@pytest.fixture(scope="module")
def predictor(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return profiled(megatron, tmp_path_factory.mktemp("profile"), SMALL)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(tuple(CASES[i] for i in QUICK), id="five"),
        pytest.param(CASES, id="all twelve", marks=pytest.mark.long),
    ],
)
def test_memory_of_every_stage_of_every_case_is_ranked_as_measured(
    megatron: Megatron, predictor: Predictor, cases: tuple[Case, ...]
) -> None:
    outcomes = [outcome(megatron, predictor, case, SMALL) for case in cases]
    predicted = [need for o in outcomes for need in o.predicted_bytes]
    measured = [peak for o in outcomes for peak in o.measured_bytes]
    assert len(measured) == sum(case.pp for case in cases)
    for (p, a), (q, b) in itertools.combinations(zip(predicted, measured, strict=True), 2):
        if abs(p - q) > TIE * max(p, q):
            assert (p < q) == (a < b), f"predicted {p} and {q}, measured {a} and {b}"
    for need, peak in zip(predicted, measured, strict=True):
        assert need == pytest.approx(peak, rel=0.05, abs=EXTRA)


def totals_of(run: MeasuredRun) -> list[int]:
    return [stage.total for stage in run.stages]


def test_a_stock_report_foretells_the_peaks_of_bpipe(megatron: Megatron) -> None:
    """Static memory, activations and what computing needs, all from the stock run."""
    flags = gpt(4, 8, 8, hidden=192)
    stock = megatron.train(flags, world=4, steps=3)
    bpipe = megatron.train([*flags, "--bpipe"], world=4, steps=3)
    assert stock.ok, stock.logs
    assert bpipe.ok, bpipe.logs
    before, after = (read_report(result.out / "report") for result in (stock, bpipe))
    found = proposals(before, micro_batches=8)
    assert [q.budget for q in found] == [None, 3]
    for x, total in enumerate(found[1].totals):
        # the allocator's figure sees all that Python allocates too, which weighs in small models
        assert before.stages[x].working == pytest.approx(after.stages[x].working, abs=3 * 2**20)
        predicted = total - before.stages[x].working
        measured = after.stages[x].total - after.stages[x].working
        assert predicted == pytest.approx(measured, rel=0.05), x


def test_logits_make_the_last_stage_the_tightest(megatron: Megatron) -> None:
    """The same run but for its vocabulary, padded to 32768."""
    flags = gpt(4, 8, 4, "--make-vocab-size-divisible-by", "32768")
    result = megatron.train(flags, world=4, steps=3)
    assert result.ok, result.logs
    run = read_report(result.out / "report")
    totals = totals_of(run)
    assert totals.index(max(totals)) == 3
    assert run.stages[3].own >= 2 * 64 * 32768 * 4  # softmax: micro-batch 2, 64 tokens, fp32
    assert run.stages[3].working >= 32768 * 64 * 4  # the weight's gradient, before it is added
    # the output layer's weight, gradient and two moments beside what the middle has
    assert run.stages[3].static - run.stages[2].static == pytest.approx(16 * 32768 * 64, rel=0.05)
