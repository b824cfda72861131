"""The refined estimate: better than the bar with each row left out, and the right decisions."""

import statistics
from dataclasses import replace

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G, H100_80G
from megatron_bpipe.estimate.paper.calibration import outside_calibration
from megatron_bpipe.estimate.paper.multipliers import multipliers_fitted, multipliers_leave_one_out
from megatron_bpipe.estimate.paper.published import EXPERIMENTS
from megatron_bpipe.estimate.paper.refined import (
    Constants,
    bytes_moved,
    fit,
    leave_one_out,
    predict_mfu,
)
from megatron_bpipe.estimate.paper.tables import decisions, published_cases, table_rows
from megatron_bpipe.estimate.time.simulated import simulated_seconds

PUBLISHED = [45.3, 46.0, 42.7, 47.8, 49.2, 44.0, 34.0, 45.8, 52.0, 51.7]  # table 3
BAR = 0.71  # two bare multipliers, each row left out


def error(predicted) -> float:
    return statistics.mean(abs(a - b) for a, b in zip(predicted, PUBLISHED, strict=True))


def worst(predicted) -> float:
    return max(abs(a - b) for a, b in zip(predicted, PUBLISHED, strict=True))


def test_the_bar_is_what_it_is_said_to_be():
    cases = published_cases()
    assert error(multipliers_fitted(cases)) == pytest.approx(0.55, abs=0.01)
    assert error(multipliers_leave_one_out(cases)) == pytest.approx(BAR, abs=0.01)
    assert worst(multipliers_leave_one_out(cases)) == pytest.approx(2.44, abs=0.01)


def test_better_than_the_bar_with_each_row_left_out():
    """Claimed: mean 0.35, worst 1.6 points (row 6); fitted on all rows 0.34."""
    predicted = leave_one_out(published_cases())
    assert error(predicted) < 0.36
    assert worst(predicted) < 1.6
    assert error([row.refined_mfu for row in table_rows()]) < 0.34


def test_physics_alone_says_nothing_about_bpipe_rows_but_meets_the_others():
    rows = table_rows()
    plain = [abs(r.physics_mfu - r.published_mfu) for r in rows if not r.bpipe]
    assert statistics.mean(plain) < 0.26
    assert all(r.physics_mfu > r.published_mfu for r in rows if r.bpipe)
    assert all(r.physics_mfu == r.refined_mfu for r in rows if not r.bpipe)


def test_the_sign_of_all_four_decisions():
    """Published -3.3, -5.2, +11.8, -0.3 points: fitted, and with each row left out."""
    choices = decisions(table_rows())
    assert [round(c.published, 1) for c in choices] == [-3.3, -5.2, 11.8, -0.3]
    for choice in choices:
        assert choice.refined * choice.published > 0, choice
        assert choice.refined_loo * choice.published > 0, choice
    # The equations get the last one wrong: they know nothing of what BPipe costs.
    assert [c.equation * c.published > 0 for c in choices] == [True, True, True, False]


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.95])
def test_not_sensitive_to_the_speed_of_the_output_layer(share):
    cases = [replace(case, gpu=replace(case.gpu, matmul_share=share)) for case in published_cases()]
    assert error(leave_one_out(cases)) < BAR


@pytest.mark.parametrize("vocab", [32000, 50304, 100000])
def test_not_sensitive_to_the_vocabulary_the_paper_does_not_give(vocab):
    cases = []
    for case in published_cases():
        model = case.run.model
        if model.gated:
            case = replace(case, run=replace(case.run, model=replace(model, vocab=vocab)))
        cases.append(case)
    assert error(leave_one_out(cases)) < BAR


def test_not_sensitive_to_the_median(monkeypatch):
    monkeypatch.setattr(statistics, "median", statistics.mean)
    assert error(leave_one_out(published_cases())) < BAR


def test_fitted_constants_are_plausible():
    """An exchange at 1.6 GB/s a GPU: 6 GB/s for the 4 ranks of a stage, half a 100 Gb/s port.
    BPipe's loss equals its bytes at 235 GB/s, below the 300 GB/s of NVLink."""
    constants = fit(published_cases())
    assert 1 / constants.exchange == pytest.approx(1.6e9, rel=0.02)
    assert 1 / constants.bpipe == pytest.approx(235e9, rel=0.02)


@pytest.mark.parametrize("index", [0, 5, 9])
def test_a_row_is_not_used_for_its_own_left_out_estimate(index):
    cases = list(published_cases())
    changed = [*cases[:index], replace(cases[index], mfu=20.0), *cases[index + 1 :]]
    assert leave_one_out(changed)[index] == leave_one_out(cases)[index]


def test_bytes_moved_come_from_the_schedule():
    """Row 8: b = 2, m = 64; every eviction is fetched again, so an even number of transfers."""
    run = EXPERIMENTS[7].run()
    one = (10 * 34 + 1) * 2 * 2048 * 9984 // 4
    assert bytes_moved(run) % (2 * one) == 0
    assert 0.3 < bytes_moved(run) / (2 * one) / 64 < 0.6
    assert bytes_moved(EXPERIMENTS[7].run(bpipe=False)) == 0


def test_another_timing_function_can_take_the_place_of_the_simulation():
    case = published_cases()[0]
    constants = Constants(0.0, 0.0)

    def twice(costs, p, m):
        return 2 * simulated_seconds(costs, p, m)

    assert predict_mfu(case, constants, twice) == pytest.approx(predict_mfu(case, constants) / 2)


def test_data_parallel_replicas_cost_a_reduce_and_nothing_else():
    case = published_cases()[0]
    layout = replace(case.run.layout, dp=2)
    two = replace(case, run=replace(case.run, layout=layout, global_batch=256))
    constants = fit(published_cases())
    assert 0.95 < predict_mfu(two, constants) / predict_mfu(case, constants) < 1


def test_a_fit_needs_both_kinds_of_runs():
    plain = [case for case in published_cases() if not case.run.bpipe]
    with pytest.raises(EstimateError, match="6 runs without and 0 with BPipe"):
        fit(plain)


def test_runs_outside_the_calibrated_range_are_marked():
    cases = published_cases()
    run = cases[0].run
    assert outside_calibration(run, A100_80G, cases) == ()
    other = replace(run, layout=replace(run.layout, dp=2, pp=4), micro_batch=8)
    marked = outside_calibration(other, H100_80G, cases)
    assert marked == (
        "H100-80GB: fitted on A100-80GB",
        "layers per stage 20: fitted on 10",
        "stages 4: fitted on 8",
        "data-parallel size 2: fitted on 1",
        "micro-batch 8: fitted on 1 to 4",
        "micro-batches 8: fitted on 32 to 128",
    )
