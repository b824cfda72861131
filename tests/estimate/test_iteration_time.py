"""The closed form against a small event-driven run of 1F1B, and by hand."""

import pytest

from megatron_bpipe.estimate.time.iteration_time import Costs, iteration_seconds


def played(p: int, m: int, forward: float, backward: float, head: float) -> float:
    """1F1B op by op: stage x runs p-1-x forwards first, then one backward per forward."""
    orders = []
    for stage in range(p):
        warm = min(p - 1 - stage, m)
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(m - warm, m)])
    done: dict[tuple[str, int, int], float] = {}
    clock, place = [0.0] * p, [0] * p
    while any(place[x] < len(orders[x]) for x in range(p)):
        for x in range(p):
            while place[x] < len(orders[x]):
                kind, i = orders[x][place[x]]
                source = x - 1 if kind == "F" else x + 1
                ready = 0.0 if source in (-1, p) else done.get((kind, i, source))
                if ready is None:
                    break
                last = head / 2 if x == p - 1 else 0.0
                cost = (forward if kind == "F" else backward) + last
                clock[x] = done[kind, i, x] = max(clock[x], ready) + cost
                place[x] += 1
    return max(clock)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [8, 16, 40])
@pytest.mark.parametrize("head", [0.0, 0.3])
def test_equal_to_the_played_schedule(p, m, head):
    costs = Costs(stage=3.0, head=head, exchange=0.0, once=0.0, exposed=0.0)
    assert iteration_seconds(costs, p, m) == pytest.approx(played(p, m, 1.0, 2.0, head))


def test_head_and_sends_do_not_add_up():
    """p = 4: a middle stage waits for two exchanges, the last for one and the head."""

    def pace(head: float, exchange: float) -> float:
        costs = Costs(10.0, head, exchange, 0.0, 0.0)
        return iteration_seconds(costs, 4, 11) - iteration_seconds(costs, 4, 10)

    assert pace(head=0.5, exchange=1.0) == pytest.approx(12.0)
    assert pace(head=2.0, exchange=1.0) == pytest.approx(13.0)


def test_what_happens_once():
    costs = Costs(stage=1.0, head=0.0, exchange=0.0, once=5.0, exposed=2.0)
    assert iteration_seconds(costs, 4, 10) == 10 + 3 + 5 + 2
