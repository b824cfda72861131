"""Bytes over time: peaks from the books, what is constant, what is in flight."""

import pytest

from megatron_bpipe.schedule import balance, lower, one_f_one_b, slots
from megatron_bpipe.schedule.bases.catalogue import build
from megatron_bpipe.schedule.bases.pipedream import pipedream_2bw
from megatron_bpipe.simulate import (
    StageBytes,
    even_bytes,
    even_costs,
    live_microbatches,
    memory_peaks,
    memory_steps,
    simulate,
)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 16), (6, 12)])
def test_bpipe_flattens_the_memory_and_counts_the_pool(p, m):
    schedule = balance(one_f_one_b(p, m))
    found = simulate(lower(schedule), even_costs(p, forward=1, backward=2, transfer=0.5))
    sizes = even_bytes(p, 100, weights=7)
    peaks = memory_peaks(found, sizes)
    assert max(peaks) <= 7 + 100 * schedule.budget
    for x in range(p // 2):
        memory = memory_steps(found, sizes)
        assert memory[p - 1 - x].pool == 100 * slots(schedule, x)
        assert memory[x].peak_activations == 100 * live_microbatches(schedule)[x]
    assert peaks[0] < memory_peaks(simulate(lower(one_f_one_b(p, m)), even_costs(p)), sizes)[0]


def test_everything_is_freed_and_what_flies_comes_down():
    found = simulate(lower(build("bpipe", 8, 16)), even_costs(8, transfer=0.9))
    for memory in memory_steps(found, even_bytes(8, 10)):
        assert memory.steps[-1][1:] == (0, 0)
        assert all(resident >= 0 and flying >= 0 for _, resident, flying in memory.steps)
        times = [time for time, _, _ in memory.steps]
        assert times == sorted(times)
    flying = [max(f for _, _, f in m.steps) for m in memory_steps(found, even_bytes(8, 10))]
    assert flying[0] > 0
    assert flying[4:] == [0, 0, 0, 0]


def test_a_part_may_stay():
    """Evictions take 60 of 100 bytes, the rest stays where it is."""
    found = simulate(lower(build("bpipe", 4, 8)), even_costs(4))
    memory = memory_steps(found, (StageBytes((100,), moved=(60,)),) * 4)
    assert (
        memory[0].peak_activations == 300 + 40
    )  # beside F4: 1 (in flight), 2, 4; 3 left 40 behind
    assert memory[3].pool == 2 * 60


def test_weights_count_once_for_each_version_and_direction():
    sizes = even_bytes(4, 1, weights=1000)
    two = simulate(lower(pipedream_2bw(4, 16)), even_costs(4))
    assert [m.weights for m in memory_steps(two, sizes)] == [2000, 2000, 2000, 1000]
    lowered = lower(build("chimera", 4, 8))
    both = simulate(lowered, even_costs(4))
    assert [m.weights for m in memory_steps(both, sizes)] == [2000] * 4
    lowered = lower(build("v-half", 4, 8))
    shaped = simulate(lowered, even_costs(4, chunks=2))
    assert [m.weights for m in memory_steps(shaped, sizes)] == [1000] * 4


def test_what_w_does_not_need_goes_with_b():
    lowered = lower(build("zb-h1", 4, 8))
    found = simulate(lowered, even_costs(4))
    whole = memory_peaks(found, (StageBytes((100,)),) * 4)
    half = memory_peaks(found, (StageBytes((100,), kept_for_weight=0.5),) * 4)
    assert whole == [400] * 4
    assert all(a <= b for a, b in zip(half, whole, strict=True))
    assert half[3] < 400


def test_sizes_for_every_stage():
    found = simulate(lower(one_f_one_b(2, 2)), even_costs(2))
    with pytest.raises(ValueError, match="sizes for 3 stages, the schedule has 2"):
        memory_peaks(found, even_bytes(3, 1))
