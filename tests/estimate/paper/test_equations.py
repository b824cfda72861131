"""Equations 2-4: the paper's own example, the factor p, and what equation 3 gives for table 3."""

import pytest

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.paper.equations import equation_3, equation_4


def test_the_papers_example():
    """Section 4: 37.8 to 55.2 % is 1.46x of a stage; of the model 135/142 of that, 1.39x."""
    assert round(55.2 / 37.8, 2) == 1.46
    ratio = equation_4(55.2, 37.8, x=2, y=1, batch=128, p=8)
    assert ratio == pytest.approx((128 + 1 * 7) / (128 + 2 * 7) * 55.2 / 37.8)
    assert round(ratio, 2) == 1.39


def test_equation_4_is_the_ratio_of_equation_3():
    three = equation_3(55.2, 2, 128, 8) / equation_3(37.8, 1, 128, 8)
    assert equation_4(55.2, 37.8, 2, 1, 128, 8) == pytest.approx(three)


def test_equation_3_takes_off_the_bubble_only():
    """As read: 55.2 / (1 + 2/128 x 7) = 49.76 %; as printed 8 times that, 398 %, cannot be."""
    assert equation_3(55.2, 2, 128, 8) == pytest.approx(55.2 / (142 / 128))
    assert equation_3(55.2, 2, 128, 8) == pytest.approx(49.8, abs=0.05)
    assert equation_3(50.0, 4, 64, 1) == 50.0


def test_no_stage_and_no_batch_are_refused():
    with pytest.raises(EstimateError, match="p is 0"):
        equation_3(50, 1, 128, 0)
    with pytest.raises(EstimateError, match="micro-batch 256 of a batch of 128"):
        equation_4(50, 50, 1, 256, 128, 8)
