"""1F1B is what Megatron runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import one_f_one_b, validate
from tests.schedule.oracle import counts, megatron_order, words


def test_four_stages_eight_microbatches():
    # warm-up of stage x: 4-x-1 forwards, then F,B pairs
    assert [words(line) for line in one_f_one_b(4, 8).stages] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_fewer_microbatches_than_stages():
    assert [words(line) for line in one_f_one_b(4, 2).stages] == [
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 B0 F1 B1",
    ]


def test_one_stage():
    assert words(one_f_one_b(1, 3).stages[0]) == "F0 B0 F1 B1 F2 B2"


@settings(deadline=None)
@given(st.integers(1, 32), st.integers(1, 70))
def test_order_and_live_count(p, m):
    schedule = one_f_one_b(p, m)
    validate(schedule)
    for stage, line in enumerate(schedule.stages):
        calls = megatron_order(p, stage, m)
        assert words(line).split() == [call for call in calls if call[0] in "FB"]
        # section 2.2: "the stage x of the pipeline model needs to store p-x activations"
        assert max(here for here, _ in counts(line)) == min(m, p - stage)


@pytest.mark.parametrize(("p", "m", "named"), [(0, 1, "p is 0"), (1, 0, "m is 0")])
def test_refused(p, m, named):
    with pytest.raises(ValueError, match=named):
        one_f_one_b(p, m)
