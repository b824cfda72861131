"""Coordinates of ranks: worked by hand, refused input, and compared with Megatron's own."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_bpipe.placement import Coordinates, ParallelShape, PlacementError
from tests.harness import Megatron


def test_default_order_by_hand():
    """tp fastest, then cp, dp, and the stage slowest: rank = tp + 2 cp + 4 dp + 12 stage."""
    shape = ParallelShape(tp=2, cp=2, dp=3, pp=4)
    assert shape.world == 48
    assert shape.coordinates(0) == Coordinates(tp=0, cp=0, dp=0, ep=0, stage=0)
    assert shape.coordinates(1 + 2 * 1 + 4 * 2 + 12 * 3) == Coordinates(1, 1, 2, 0, 3)
    assert shape.groups("pp")[0] == (0, 12, 24, 36)
    assert shape.groups("dp")[0] == (0, 4, 8)
    assert shape.groups("dp-cp")[0] == (0, 2, 4, 6, 8, 10)


def test_expert_ranks_lie_inside_a_stage():
    """ep 4 of dp 8, tp 2: expert groups are ranks 0,2,4,6 and 1,3,5,7 and so on."""
    shape = ParallelShape(tp=2, dp=8, ep=4, pp=2)
    assert shape.groups("ep")[:2] == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_data_parallel_size_from_the_world():
    assert ParallelShape.from_world(64, tp=4, pp=8).dp == 2
    with pytest.raises(PlacementError, match=r"world of 60 ranks .* = 32: start 32 ranks"):
        ParallelShape.from_world(60, tp=4, pp=8)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 0}, "tp is 0"),
        ({"pp": -2}, "pp is -2"),
        ({"dp": 4, "ep": 3}, r"ep 3 does not divide cp x dp = 1 x 4 = 4: .* from 1, 2, 4"),
        ({"order": "tp-xp-pp"}, "names 'xp'"),
        ({"order": "tp-pp-tp"}, "names tp twice"),
        ({"order": "tp-pp", "dp": 2}, "leaves out dp, whose size is 2"),
        ({"order": "tp-cp-ep-pp-dp", "dp": 4, "ep": 2, "pp": 2}, "that ends in pp"),
        ({"order": "tp-cp-ep-pp-dp", "cp": 2, "pp": 2}, "cp 2 and ep 1"),
    ],
)
def test_bad_sizes_are_refused_by_name(sizes, words):
    with pytest.raises(PlacementError, match=words):
        ParallelShape(**sizes)


def test_a_rank_outside_the_job_is_refused():
    with pytest.raises(PlacementError, match="rank 4 is not one of this job's: 0 to 3"):
        ParallelShape(pp=4).coordinates(4)


ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "tp-cp-pp-ep-dp", "tp-pp-dp", "pp-tp-cp-dp")
SHAPES = [
    ParallelShape(tp, cp, ep, dp, pp, order)
    for order in ORDERS
    for tp, cp, dp, pp in [
        (1, 1, 1, 1), (1, 1, 1, 16), (4, 1, 1, 8), (2, 1, 3, 5), (2, 2, 2, 4), (1, 4, 2, 3),
        (3, 1, 4, 2), (8, 1, 2, 2),
    ]
    for ep in ((1, 2, 4) if order.endswith("pp") else (cp,))
    if (cp * dp) % ep == 0 and (order in ORDERS[:2] or cp == 1)
]  # fmt: skip

MEGATRON = """
import json, sys
from megatron.core.parallel_state import RankGenerator
answers = []
for tp, cp, ep, dp, pp, order in json.loads(sys.argv[1]):
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=tp, ep=ep, dp=cp * dp // ep, pp=pp, cp=1, order=order)
    groups = {axis: dense.get_ranks(axis) for axis in ("tp", "cp", "dp", "pp", "dp-cp")}
    answers.append({**groups, "ep": expert.get_ranks("ep")})
print("answers:" + json.dumps(answers))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)
def test_the_same_groups_as_megatron(megatron: Megatron, tmp_path: Path) -> None:
    """Every group of every axis."""
    question = [[s.tp, s.cp, s.ep, s.dp, s.pp, s.order] for s in SHAPES]
    script = tmp_path / "groups.py"
    script.write_text(MEGATRON)
    done = megatron.script(str(script), [json.dumps(question)], world=1)
    assert done.ok, done.logs
    line = next(line for line in done.log(0).splitlines() if line.startswith("answers:"))
    for shape, theirs in zip(SHAPES, json.loads(line.removeprefix("answers:")), strict=True):
        for axis, groups in theirs.items():
            ours = [sorted(group) for group in shape.groups(axis)]
            assert sorted(ours) == sorted(sorted(group) for group in groups), (shape, axis)
        for group in theirs["pp"]:
            assert [shape.coordinates(rank).stage for rank in group] == list(range(shape.pp))
        for axis in ("tp", "cp", "dp", "ep"):
            for group in theirs[axis]:
                ours = [getattr(shape.coordinates(rank), axis) for rank in group]
                assert ours == list(range(len(group))), (shape, axis)
