"""Pair-adjacent placement: the published figure, and properties over every small job."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.placement import (
    ParallelShape,
    PlacementError,
    common_node_size,
    count_traffic,
    megatron_order,
    pair_adjacent,
    slot_of_rank,
)


def stages_on(shape: ParallelShape, gpus_per_node: int) -> list[int]:
    return [shape.coordinates(rank).stage for rank in pair_adjacent(shape, gpus_per_node)]


def test_figure_2():
    """Figure 2 of the paper: 16 stages on two nodes of 8."""
    assert stages_on(ParallelShape(pp=16), 8) == [
        *(0, 15, 1, 14, 2, 13, 3, 12),
        *(4, 11, 5, 10, 6, 9, 7, 8),
    ]


def test_the_papers_own_cluster():
    """t = 4, p = 8 on four nodes of 8: (0,7), (1,6), (2,5), (3,4)."""
    shape = ParallelShape(tp=4, pp=8)
    stages = stages_on(shape, 8)
    assert stages == [s for pair in ((0, 7), (1, 6), (2, 5), (3, 4)) for s in pair for _ in "tttt"]
    counts = count_traffic(shape, pair_adjacent(shape, 8), 8)
    assert str(counts.pairs) == "0 of 16"
    assert str(counts.tp_groups) == "0 of 8"
    assert str(counts.pipeline_edges) == "24 of 28"
    before = count_traffic(shape, megatron_order(shape, 8), 8)
    # Megatron's order has stages (0,1), (2,3), (4,5), (6,7): no pair shares a node.
    assert str(before.pairs) == "16 of 16"
    assert str(before.pipeline_edges) == "12 of 28"


def test_figure_2_counts():
    shape = ParallelShape(pp=16)
    after = count_traffic(shape, pair_adjacent(shape, 8), 8)
    before = count_traffic(shape, megatron_order(shape, 8), 8)
    assert (after.pairs.across_nodes, before.pairs.across_nodes) == (0, 8)
    assert (after.pipeline_edges.across_nodes, before.pipeline_edges.across_nodes) == (2, 1)
    assert after.dp_rings.total == 0


def test_odd_p_the_middle_stage_has_no_partner():
    assert stages_on(ParallelShape(pp=5), 5) == [0, 4, 1, 3, 2]
    # Two nodes of 5 for dp 2: each takes two pairs and one middle stage.
    shape = ParallelShape(pp=5, dp=2)
    placement = pair_adjacent(shape, 5)
    assert count_traffic(shape, placement, 5).pairs.across_nodes == 0


def test_dp_stays_together_while_pair_and_copies_fit():
    shape = ParallelShape(pp=8, dp=4)
    counts = count_traffic(shape, pair_adjacent(shape, 8), 8)
    assert counts.pairs.across_nodes == 0
    assert counts.dp_rings.across_nodes == 0


def test_dp_is_split_not_the_pair():
    """A stage with 8 copies is wider than half a node of 8."""
    shape = ParallelShape(pp=4, dp=8)
    placement = pair_adjacent(shape, 8)
    counts = count_traffic(shape, placement, 8)
    assert counts.pairs.across_nodes == 0
    assert counts.dp_rings.across_nodes == counts.dp_rings.total == 4
    first_node = [shape.coordinates(rank) for rank in placement[:8]]
    assert sorted({at.dp for at in first_node}) == [0, 1, 2, 3]
    assert {at.stage for at in first_node} == {0, 3}


def test_tp_as_wide_as_a_node_cannot_share_and_stays_whole():
    shape = ParallelShape(tp=8, pp=4)
    placement = pair_adjacent(shape, 8)
    counts = count_traffic(shape, placement, 8)
    assert counts.tp_groups.across_nodes == 0
    assert counts.pairs.across_nodes == counts.pairs.total
    # Partners sit on neighbouring nodes at least.
    assert [shape.coordinates(rank).stage for rank in placement[::8]] == [0, 3, 1, 2]


def test_tp_over_several_nodes():
    shape = ParallelShape(tp=16, pp=2)
    assert pair_adjacent(shape, 8) == tuple(range(32))


def test_expert_groups_stay_on_their_node_where_they_fit():
    shape = ParallelShape(pp=4, dp=4, ep=4)
    counts = count_traffic(shape, pair_adjacent(shape, 8), 8)
    assert counts.ep_groups.total == 4
    assert counts.ep_groups.across_nodes == 0


def test_order_with_dp_outside_keeps_pipelines_together():
    """--use-tp-pp-dp-mapping: one pipeline of 4 per node, as in Megatron's own order."""
    shape = ParallelShape(pp=4, dp=2, order="tp-cp-ep-pp-dp")
    placement = pair_adjacent(shape, 4)
    assert [(shape.coordinates(r).dp, shape.coordinates(r).stage) for r in placement] == [
        *((0, 0), (0, 3), (0, 1), (0, 2)),
        *((1, 0), (1, 3), (1, 1), (1, 2)),
    ]
    assert count_traffic(shape, placement, 4).pipeline_edges.across_nodes == 0


ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "tp-pp-cp-ep-dp", "pp-dp-tp-cp", "dp-pp-tp-cp-ep")


@st.composite
def jobs(draw):
    """A shape and a node size that the placement accepts."""
    order = draw(st.sampled_from(ORDERS))
    shape = ParallelShape(
        tp=draw(st.integers(1, 4)),
        cp=draw(st.integers(1, 2)) if order == ORDERS[0] else 1,
        dp=draw(st.integers(1, 6)),
        pp=draw(st.integers(1, 9)),
        order=order,
    )
    nodes = [
        n
        for n in range(1, shape.world + 1)
        if shape.world % n == 0 and (n % shape.tp == 0 or shape.tp % n == 0)
    ]
    return shape, draw(st.sampled_from(nodes))


@given(jobs())
@settings(max_examples=300, deadline=None)
def test_a_permutation_with_rank_0_on_slot_0(job):
    shape, gpus_per_node = job
    placement = pair_adjacent(shape, gpus_per_node)
    assert sorted(placement) == list(range(shape.world))
    assert placement[0] == 0
    assert [placement[slot] for slot in slot_of_rank(placement)] == list(range(shape.world))


@given(jobs())
@settings(max_examples=300, deadline=None)
def test_tensor_parallel_groups_are_never_torn(job):
    shape, gpus_per_node = job
    counts = count_traffic(shape, pair_adjacent(shape, gpus_per_node), gpus_per_node)
    expected = counts.tp_groups.total if shape.tp > gpus_per_node else 0
    assert counts.tp_groups.across_nodes == expected


@functools.cache
def most_whole_pairs(pairs: int, singles: int, rooms: tuple[int, ...]) -> int:
    """Search: most pairs of cells that can share a node; the others may be torn.

    ``rooms`` is how many cells each node still takes, sorted.
    """
    rooms = tuple(sorted(room for room in rooms if room))
    if not pairs:
        return 0
    best = 0
    for index, room in enumerate(rooms):  # the next pair goes whole to one node ...
        if room >= 2:
            left = (*rooms[:index], room - 2, *rooms[index + 1 :])
            best = max(best, 1 + most_whole_pairs(pairs - 1, singles, left))
    for first in range(len(rooms)):  # ... or torn over two
        for second in range(first + 1, len(rooms)):
            left = list(rooms)
            left[first] -= 1
            left[second] -= 1
            best = max(best, most_whole_pairs(pairs - 1, singles, tuple(sorted(left))))
    return best


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", range(1, 8))
def test_no_search_finds_more_whole_pairs(order, tp, pp):
    """Brute force over every way to deal TP groups to nodes, for all small dp and node sizes."""
    for dp in range(1, 6):
        shape = ParallelShape(tp=tp, dp=dp, pp=pp, order=order)
        cells = dp * pp
        if cells > 15:
            continue
        for cells_per_node in (c for c in range(1, cells + 1) if cells % c == 0):
            size = cells_per_node * tp
            counts = count_traffic(shape, pair_adjacent(shape, size), size)
            whole = (counts.pairs.total - counts.pairs.across_nodes) // tp
            rooms = (cells_per_node,) * (cells // cells_per_node)
            assert whole == most_whole_pairs(dp * (pp // 2), dp * (pp % 2), rooms), (shape, size)


@given(jobs())
@settings(max_examples=300, deadline=None)
def test_as_many_whole_pairs_as_can_be_counted(job):
    """The same for larger jobs: nodes of an odd number of cells need a middle stage each."""
    shape, gpus_per_node = job
    counts = count_traffic(shape, pair_adjacent(shape, gpus_per_node), gpus_per_node)
    cells = gpus_per_node // shape.tp
    if cells < 2:
        assert counts.pairs.across_nodes == (counts.pairs.total if shape.pp > 1 else 0) or (
            gpus_per_node == shape.world
        )
        return
    middle = shape.cp * shape.dp * (shape.pp % 2)
    nodes = shape.world // gpus_per_node
    torn = max(0, nodes - middle) // 2 if cells % 2 else 0
    assert counts.pairs.across_nodes == torn * shape.tp


@pytest.mark.parametrize(
    ("shape", "gpus_per_node", "words"),
    [
        (ParallelShape(pp=6), 4, ["4 GPUs per node", "6 ranks", "for example 3"]),
        (ParallelShape(pp=4), 8, ["8 GPUs per node", "4 ranks", "for example 4"]),
        (ParallelShape(pp=4), 0, ["0 GPUs per node"]),
        (ParallelShape(tp=3, pp=8), 8, ["tp 3", "8 GPUs per node", "1, 2, 4, 8", "megatron"]),
    ],
)
def test_nodes_that_do_not_fit_are_refused(shape, gpus_per_node, words):
    with pytest.raises(PlacementError) as caught:
        pair_adjacent(shape, gpus_per_node)
    for word in words:
        assert word in str(caught.value)


def test_tp_that_straddles_is_left_alone_by_the_megatron_placement():
    shape = ParallelShape(tp=3, pp=8)
    counts = count_traffic(shape, megatron_order(shape, 8), 8)
    assert counts.tp_groups.across_nodes == 2


def test_a_placement_from_another_job_is_refused():
    with pytest.raises(PlacementError, match="a job of 16 ranks, this one has 32"):
        count_traffic(ParallelShape(pp=16, dp=2), tuple(range(16)), 8)
    with pytest.raises(PlacementError, match="does not name rank 3"):
        count_traffic(ParallelShape(pp=4), (0, 1, 2, 2), 4)


def test_nodes_of_unequal_size_are_refused():
    assert common_node_size([8, 8, 8]) == 8
    with pytest.raises(PlacementError, match="4 and 8 ranks"):
        common_node_size([8, 4, 8])
    with pytest.raises(PlacementError, match="no nodes"):
        common_node_size([])
