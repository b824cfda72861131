"""The simulated iteration against its closed form, and against itself."""

from dataclasses import replace

import pytest

from megatron_bpipe.estimate.paper.refined import costs
from megatron_bpipe.estimate.paper.tables import published_cases, published_constants
from megatron_bpipe.estimate.time.iteration_time import Costs, iteration_seconds
from megatron_bpipe.estimate.time.simulated import simulated_seconds
from megatron_bpipe.schedule import lower, one_f_one_b
from megatron_bpipe.simulate import simulate
from megatron_bpipe.simulate.costs import Costs as OpCosts
from megatron_bpipe.simulate.costs import StageCosts


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 9), (4, 4), (8, 64), (16, 100)])
@pytest.mark.parametrize(("exchange", "head"), [(0.0, 0.0), (0.01, 0.05), (0.03, 0.02)])
def test_extrapolation_is_exact_and_the_closed_form_close(p, m, exchange, head):
    """The closed form counts one or two exchanges more of the m + p - 1 steps, at most."""
    found = simulated_seconds(Costs(1.0, head, exchange, 0.0, 0.0), p, m)
    plain = StageCosts((1 / 3,), (2 / 3,))
    last = StageCosts(((1 + head) / 3,), (2 * (1 + head) / 3,))
    stages = OpCosts((*[plain] * (p - 1), last), send=exchange)
    assert found == pytest.approx(simulate(lower(one_f_one_b(p, m)), stages).seconds)
    closed = iteration_seconds(Costs(1.0, head, exchange, 0.0, 0.0), p, m)
    assert abs(found - closed) <= 2 * exchange + 1e-9


def test_at_nvlink_speed_the_simulation_hides_every_transfer_of_the_paper():
    """So the penalty that BPipe paid there is not the bytes' own time on a free link."""
    constants = published_constants()
    for case in published_cases():
        if case.run.bpipe:
            real = replace(costs(case, constants), exposed=0.0)
            assert real.transfer is not None
            assert real.transfer < real.stage / 3
            sizes = case.run.layout.pp, case.run.micro_batches
            free = replace(real, transfer=0.0)
            assert simulated_seconds(real, *sizes) == simulated_seconds(free, *sizes)
            slow = replace(real, transfer=real.stage)
            assert simulated_seconds(slow, *sizes) > simulated_seconds(free, *sizes)


def test_what_is_once_is_added():
    base = simulated_seconds(Costs(1.0, 0.0, 0.0, 0.0, 0.0), 4, 8)
    assert simulated_seconds(Costs(1.0, 0.0, 0.0, 2.0, 3.0), 4, 8) == base + 5
