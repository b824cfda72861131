"""Ops as text, pairs, the paper's bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import (
    DOWN,
    UP,
    Direction,
    Kind,
    Op,
    Schedule,
    default_budget,
    is_evictor,
    partner,
)
from megatron_bpipe.schedule.ops import HOST, TRANSFERS

COUNT = st.integers(0, 10**6)
OPS = st.sampled_from(Kind).flatmap(
    lambda kind: st.builds(
        Op,
        st.just(kind),
        COUNT,
        COUNT,
        st.sampled_from(Direction),
        version=st.none() | COUNT,
        label=st.none() | COUNT,
        other=st.none() | COUNT | st.just(HOST) if kind in TRANSFERS else st.none(),
        part=st.none() | COUNT,
    )
)


@pytest.mark.parametrize(
    ("text", "op"),
    [
        ("F3", Op(Kind.FORWARD, 3)),
        ("F3.1", Op(Kind.FORWARD, 3, 1)),
        ("F3~", Op(Kind.FORWARD, 3, 0, UP)),
        ("F3@2", Op(Kind.FORWARD, 3, 0, DOWN, 2)),
        ("F3@0", Op(Kind.FORWARD, 3, 0, DOWN, 0)),
        ("EW12.1~@2", Op(Kind.EVICT_WAIT, 12, 1, UP, 2)),
        ("RT0", Op(Kind.RETURN, 0)),
        ("E3/0", Op(Kind.EVICT, 3, part=0)),
        ("L3.1/2", Op(Kind.LOAD, 3, 1, part=2)),
        ("EW3.1~/12@2", Op(Kind.EVICT_WAIT, 3, 1, UP, 2, part=12)),
        ("B3/1", Op(Kind.BACKWARD, 3, part=1)),
        ("E3/0>5", Op(Kind.EVICT, 3, other=5, part=0)),
        ("E3>5", Op(Kind.EVICT, 3, other=5)),
        ("LW3.1<host", Op(Kind.LOAD_WAIT, 3, 1, other=HOST)),
        ("AC3<0", Op(Kind.ACCEPT, 3, other=0)),
        ("RT3@1>0", Op(Kind.RETURN, 3, version=1, other=0)),
    ],
)
def test_text(text, op):
    assert str(op) == text
    assert Op.parse(text) == op


@settings(deadline=None)
@given(OPS)
def test_round_trip(op):
    assert Op.parse(str(op)) == op


@settings(deadline=None)
@given(st.text("FBELSRWACT0123.~/@-<> \n٣", max_size=8) | st.text(max_size=5))
def test_one_op_has_one_text(text):
    try:
        op = Op.parse(text)
    except ValueError:
        return
    assert str(op) == text


@pytest.mark.parametrize(
    "text",
    [
        *("F", "3", "f3", "F-1", "F03", "F3.0", "F3.", "F3@", "F3~~", "F3@1~", "F3.1.1", "F٣"),
        *("E3/", "E3/00", "E3/-1", "E3@1/0", "E3/0~", "E3/0/1"),
        *("X3", "EF3", "F3,F4", "", "F3 ", " F3", "F3\n", "F" + "9" * 5000),
        *("F3>1", "E3<5", "L3>5", "E3>", "E3>05", "E3>-1", "E3>5@1"),
    ],
)
def test_refused(text):
    with pytest.raises(ValueError, match="is not an op") as caught:
        Op.parse(text)
    assert repr(text) in str(caught.value)


def test_pairs():
    assert [partner(x, 4) for x in range(4)] == [3, 2, 1, 0]
    assert [partner(x, 5) for x in range(5)] == [4, 3, None, 1, 0]
    assert [is_evictor(x, 5) for x in range(5)] == [True, True, False, False, False]
    assert partner(0, 1) is None
    with pytest.raises(ValueError, match=r"stage 4 of p = 4: must be from 0 to 3"):
        partner(4, 4)


def test_default_budget():
    # ceil((p+2)/2)                   3/2  4/2  5/2  6/2  7/2  8/2  9/2  10/2
    assert [default_budget(p) for p in range(1, 9)] == [2, 2, 3, 3, 4, 4, 5, 5]
    with pytest.raises(ValueError, match="p is 0"):
        default_budget(0)


def test_activation_names_what_an_op_is_about():
    assert Op.parse("F3.1~@2").activation == Op.parse("LW3.1~").activation == (3, 1, True)
    assert Op.parse("F3").activation != Op.parse("F3~").activation


def test_schedule_knows_its_size():
    assert Schedule("none", 1, ((), ())).p == 2
